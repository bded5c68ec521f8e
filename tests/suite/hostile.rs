//! Hostile input: whatever a file holds, a program ends with a sentence, in time and within bounds of memory.

mod files;
mod mutants;
mod seeds;
mod tables;
mod templates;
