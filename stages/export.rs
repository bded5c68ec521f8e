//! The program `export`: see `rlhf::export`.

use std::process::ExitCode;

use mimalloc::MiMalloc;
use rlhf::settings::run_program;

#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> ExitCode {
    run_program(|settings| rlhf::export::run(&settings).map(drop))
}
