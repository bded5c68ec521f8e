//! The program `score`.

rlhf::program!("score");
