//! `-h`: the flags that people turn, on one screen. `--help` has all of them.

use std::fmt::Write as _;

use clap::{Arg, Command};

use super::Program;

/// Flags under a heading.
pub struct Section {
    /// The heading.
    pub heading: &'static str,
    /// The flags.
    pub flags: &'static [ShortFlag],
}

/// A flag by the name of its field; what follows it, in one word, empty where nothing does; and what it sets, in a few.
pub struct ShortFlag(pub &'static str, pub &'static str, pub &'static str);

/// The screen of a program that is called by this name; nothing where it has no sections.
pub fn short_help<S: Program>(called: &str) -> Option<String> {
    let (command, sections) = (S::command(), S::short_help());
    (!sections.is_empty()).then(|| render(&command, called, &sections))
}

fn render(command: &Command, called: &str, sections: &[Section]) -> String {
    let of = |&ShortFlag(id, value, text): &ShortFlag| -> (String, String) {
        let argument = command.get_arguments().find(|argument| argument.get_id() == id);
        let argument = argument.unwrap_or_else(|| panic!("{} has no flag {}", command.get_name(), id));
        let name = format!("--{} {}", argument.get_long().unwrap_or(id), value);
        (name.trim_end().to_string(), format!("{}{}", text, default_of(argument)))
    };
    let flags = sections.iter().flat_map(|section| section.flags).map(of);
    let width = flags.map(|(name, _)| name.len()).max().unwrap_or(0);
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    let required: String = command
        .get_arguments()
        .filter(|argument| argument.is_required_set())
        .filter_map(|argument| Some(format!(" --{} {}", argument.get_long()?, argument.get_value_names()?.first()?)))
        .collect();
    let mut text = format!("{about}\n\nUsage: {called}{required} [OPTIONS]\n");
    for section in sections {
        write!(text, "\n{}:\n", section.heading).expect("a string takes every text");
        for (name, sets) in section.flags.iter().map(of) {
            writeln!(text, "  {name:<width$}  {sets}").expect("a string takes every text");
        }
    }
    let all = command.get_arguments().count();
    writeln!(text, "\n--help explains all {all} flags.").expect("a string takes every text");
    text
}

/// Its default in brackets, where it has one that is a word.
fn default_of(argument: &Arg) -> String {
    match argument.get_default_values() {
        [default] if !default.is_empty() && argument.get_action().takes_values() => {
            format!(" [{}]", default.to_string_lossy())
        }
        _ => String::new(),
    }
}

/// Whether the user asks for this screen: `-h` and not `--help`.
pub(super) fn is_asked(arguments: &[std::ffi::OsString]) -> bool {
    arguments.iter().take_while(|argument| *argument != "--").any(|argument| argument == "-h")
}

/// What every training program has.
pub const TRAINING: Section = Section {
    heading: "Training",
    flags: &[
        ShortFlag("method", "NAME", "full, lora, ia3, prefix-tuning ..."),
        ShortFlag("lora_r", "N", "LoRA: rank"),
        ShortFlag("lora_alpha", "X", "LoRA: the update is scaled by alpha / r"),
        ShortFlag("target_modules", "NAMES", "LoRA: layers, or all-linear"),
        ShortFlag("learning_rate", "X", "Peak learning rate [by method]"),
        ShortFlag("batch_size", "N", "Examples in an optimizer step"),
        ShortFlag("epochs", "N", "Passes over the data"),
        ShortFlag("max_steps", "N", "Stop after this many optimizer steps"),
    ],
};

/// What fits a run to a machine, and how it continues.
pub const MEMORY: Section = Section {
    heading: "Memory and resuming",
    flags: &[
        ShortFlag("max_length", "N", "Longest sequence in tokens"),
        ShortFlag("tokens_per_batch", "N", "Tokens of a pass: memory, not results"),
        ShortFlag("gradient_checkpointing", "X", "off, or blocks: less memory, more time"),
        ShortFlag("base_precision", "X", "Frozen base: stored, f32, q8_0 or q4_k"),
        ShortFlag("resume", "", "Continue from the newest checkpoint in --output"),
    ],
};

/// What most programs share.
pub const GENERAL: Section = Section {
    heading: "General",
    flags: &[
        ShortFlag("settings", "FILE", "TOML file of flags by name; the command line wins"),
        ShortFlag("seed", "N", "Seed of everything random"),
        ShortFlag("threads", "N", "Number of threads [one per core]"),
    ],
};

/// How answers are drawn.
pub const SAMPLING: Section = Section {
    heading: "Sampling",
    flags: &[
        ShortFlag("response_length", "N", "Most tokens of an answer"),
        ShortFlag("temperature", "X", "Divides logits; 0 is greedy"),
        ShortFlag("top_p", "X", "Nucleus: share of probability to draw from"),
        ShortFlag("top_k", "N", "Draw from so many tokens; 0 for all"),
    ],
};
