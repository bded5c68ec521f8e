//! Files on other machines: data in object stores and on web servers ([`objects`]), models and data sets of the Hugging Face hub ([`hub`]).
//!
//! The programs wait for what they read, so that requests run on one thread of this module while the caller's is blocked.

pub mod hub;
pub mod objects;
#[cfg(test)]
#[path = "../tests/suite/server.rs"]
mod server;

use std::future::Future;
use std::sync::LazyLock;

use tokio::runtime::{Builder, Runtime};

use crate::error::{Error, Result};

/// Runs a request to its end, on the thread that calls; its connections live on a thread of their own.
fn wait<T>(request: impl Future<Output = T>) -> Result<T> {
    static RUNTIME: LazyLock<std::io::Result<Runtime>> = LazyLock::new(|| {
        // The one provider of cryptography that is built in; an error says that it is installed already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        Builder::new_multi_thread().worker_threads(1).thread_name("remote").enable_all().build()
    });
    let runtime = RUNTIME.as_ref().map_err(|error| {
        Error::input(format!(
            "the thread that reads remote files cannot be started: {error}; free some memory or threads"
        ))
    })?;
    Ok(runtime.block_on(request))
}

/// The innermost cause of an error, which says the most.
fn root(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
