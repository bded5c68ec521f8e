//! What alignment did.
pub mod bootstrap;
pub mod diversity;
