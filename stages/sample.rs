//! The program `sample`.

rlhf::program!("sample");
