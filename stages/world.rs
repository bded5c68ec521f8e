//! The program `world`.

rlhf::program!("world");
