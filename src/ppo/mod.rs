//! Proximal policy optimisation against a reward model.

pub mod advantage;
pub mod objective;
