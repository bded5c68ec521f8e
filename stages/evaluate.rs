//! The program `evaluate`.

rlhf::program!("evaluate");
