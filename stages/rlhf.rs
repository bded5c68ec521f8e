//! The program `rlhf`: every other program as a subcommand.

use std::process::ExitCode;

rlhf::use_allocator!();

fn main() -> ExitCode {
    rlhf::programs::main(std::env::args_os().collect())
}
