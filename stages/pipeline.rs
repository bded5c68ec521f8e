//! The program `pipeline`.

rlhf::program!("pipeline");
