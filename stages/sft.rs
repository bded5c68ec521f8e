//! The program `sft`.

rlhf::program!("sft");
