//! From Parquet rows to packed batches of tokens.

pub mod batch;
pub mod column;
mod conversation;
pub mod inspect;
pub mod json_column;
mod labels;
mod layout;
pub mod mixture;
mod mixture_template;
pub mod parquet;
mod parquet_batches;
mod parquet_file;
mod parquet_pages;
mod parquet_structs;
pub mod record;
mod remarks;
pub mod row_index;
pub mod schema;
pub mod template;
pub mod text_column;
mod thrift;
pub mod tokenize;
pub mod tokenize_records;
mod tokenizer_files;
pub mod train_tokenizer;
pub mod window;
