//! All integration tests, in one program: linking is the slow part of building them.

mod adapters;
mod chat_templates;
mod choices;
mod classification;
mod classifiers;
mod common;
mod data;
mod declared_tokens;
#[cfg(target_os = "linux")]
mod faults;
mod folders;
mod formats;
mod forms;
mod golden;
mod hostile;
mod hub;
mod methods;
mod metrics;
mod mutation;
mod oracle;
mod packing;
mod ppo;
mod ppo_runs;
mod programs;
mod remote;
mod report_in_browser;
mod reward;
mod server;
mod stages;
mod streamed_stages;
mod streaming;
mod survival;
mod tokens;
mod users;
mod workbench;
mod world;
