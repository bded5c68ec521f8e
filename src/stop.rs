//! Being asked to stop: SIGINT (Ctrl-C) and SIGTERM let a run come to a point from which it can go on; a second one ends it at once.
//!
//! Between two steps a run asks by itself whether a signal came ([`requested`]). Work that may take minutes and changes nothing, such as an
//! evaluation, is given up in the middle: while a [`Heeding`] lives, each pass through a model ends with an error
//! where a signal came ([`check`]).

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::error::{Error, Result};

/// What the handlers of the signals share with the program.
struct Flags {
    /// Whether nothing is running that could come to such a point: then a signal ends the process as it always does.
    idle: Arc<AtomicBool>,
    /// Whether a signal came.
    requested: Arc<AtomicBool>,
    /// Which one.
    signal: Arc<AtomicUsize>,
    /// Whether what is being done may be given up in the middle.
    heeding: AtomicBool,
}

static FLAGS: LazyLock<Flags> = LazyLock::new(|| Flags {
    idle: Arc::new(AtomicBool::new(true)),
    requested: Arc::new(AtomicBool::new(false)),
    signal: Arc::new(AtomicUsize::new(0)),
    heeding: AtomicBool::new(false),
});

/// While it lives, a first signal is only noted.
#[derive(Debug)]
pub struct Listening(());

/// Begins to listen.
pub fn listen() -> Result<Listening> {
    static REGISTERED: LazyLock<std::io::Result<()>> = LazyLock::new(register);
    if let Err(error) = &*REGISTERED {
        return Err(Error::input(format!("the signals SIGINT and SIGTERM cannot be listened for: {error}")));
    }
    FLAGS.idle.store(false, Ordering::SeqCst);
    Ok(Listening(()))
}

fn register() -> std::io::Result<()> {
    for signal in [SIGINT, SIGTERM] {
        // In this order: a signal that finds the flag set by an earlier one ends the process.
        flag::register_conditional_default(signal, FLAGS.idle.clone())?;
        flag::register_conditional_default(signal, FLAGS.requested.clone())?;
        flag::register_usize(signal, FLAGS.signal.clone(), signal as usize)?;
        flag::register(signal, FLAGS.requested.clone())?;
    }
    Ok(())
}

impl Drop for Listening {
    fn drop(&mut self) {
        FLAGS.idle.store(true, Ordering::SeqCst);
    }
}

/// While it lives, what is being done may be given up in the middle.
#[derive(Debug)]
pub struct Heeding(());

/// From now on what is done may be given up in the middle.
pub fn heed() -> Heeding {
    FLAGS.heeding.store(true, Ordering::SeqCst);
    Heeding(())
}

impl Drop for Heeding {
    fn drop(&mut self) {
        FLAGS.heeding.store(false, Ordering::SeqCst);
    }
}

/// Ends what is being done, if it may be given up in the middle and a signal came.
///
/// # Errors
/// [`Error::Stopped`] then.
pub fn check() -> Result<()> {
    match requested().filter(|_| FLAGS.heeding.load(Ordering::SeqCst)) {
        Some(signal) => Err(Error::Stopped(format!("stopped by {signal}"))),
        None => Ok(()),
    }
}

/// The name of the signal that asked the program to stop, if one did.
pub fn requested() -> Option<&'static str> {
    let signal = FLAGS.requested.load(Ordering::SeqCst).then(|| FLAGS.signal.load(Ordering::SeqCst))?;
    Some(if signal == SIGINT as usize { "SIGINT" } else { "SIGTERM" })
}
