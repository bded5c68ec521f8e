//! The program `evaluate`: see `rlhf::evaluate`.

use std::process::ExitCode;

use mimalloc::MiMalloc;
use rlhf::settings::run_program;

#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> ExitCode {
    run_program(|settings| rlhf::evaluate::run(&settings).map(drop))
}
