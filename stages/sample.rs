//! The program `sample`: see `rlhf::sample`.

use std::process::ExitCode;

use mimalloc::MiMalloc;
use rlhf::settings::run_program;

#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> ExitCode {
    run_program(|settings| rlhf::sample::run(&settings).map(drop))
}
