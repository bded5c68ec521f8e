//! The program `ppo`.

rlhf::program!("ppo");
