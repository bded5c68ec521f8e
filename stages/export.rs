//! The program `export`.

rlhf::program!("export");
