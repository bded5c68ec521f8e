//! The program `reward`.

rlhf::program!("reward");
