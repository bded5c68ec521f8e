//! From Parquet rows to packed batches of tokens.

pub mod batch;
