//! From Parquet rows to packed batches of tokens.

pub mod batch;
pub mod column;
pub mod inspect;
mod labels;
mod layout;
pub mod mixture;
mod mixture_template;
pub mod parquet;
mod parquet_batches;
mod parquet_file;
mod parquet_pages;
mod parquet_structs;
mod remarks;
pub mod row_index;
pub mod schema;
mod special_tokens;
pub mod template;
pub mod text_column;
mod thrift;
pub mod tokenize;
pub mod tokenize_records;
mod tokenizer_files;
mod tokenizer_settings;
pub mod train_tokenizer;
pub mod window;
