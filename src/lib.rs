//! Aligning language models with human feedback: supervised fine-tuning, reward modelling and PPO, on one model core.
//!
//! # The map
//!
//! From the bottom up; a module imports only modules below it.
//!
//! * [`error`], [`limits`], [`numbers`], [`random`], [`files`], [`stop`]: one error type, whose messages name
//!   the file and the column or tensor; what a hostile file may cost; minimum and maximum that keep NaN,
//!   where `f32::max` drops it; every random number by the name of its stream; files that are written whole
//!   or not at all; signals.
//! * [`remote`]: files on other machines: object stores, web servers, models and data sets of the Hugging
//!   Face hub.
//! * [`settings`]: settings that are the command line, the TOML file and the record. One table a program says
//!   in which mode each flag is read; a flag that the chosen mode does not read is refused by its name
//!   (`settings/flags.rs`).
//! * [`gguf`]: a GGUF file presented as the folder that `transformers` would have: `config.json` and the
//!   tokenizer's files made of its metadata, its tensors dequantised to f32 under the names of the folder's.
//!   A path of it is taken wherever that of a folder is, by what opens bases, weights and tokenizers.
//! * [`data`]: from rows of files to packed batches.
//!     * Files: [`data::files`] says which files a pattern names, [`data::splits`] which of a folder or of a
//!       data set of the hub belong to the split that is asked for, [`data::table`] reads their rows in every
//!       form (Parquet, JSON Lines, JSON, CSV, Arrow, compressed or not), [`data::row_index`] any rows of
//!       many, [`data::window`] orders more rows than memory holds.
//!     * Records: [`data::schema`] makes records ([`data::record`]) of rows in the layouts that people use.
//!       Messages keep all their fields. [`data::notes`] collects what has to be said once, with counts:
//!       columns that are not used, files of other splits.
//!     * Tokens: [`data::template`] renders conversations and finds the assistant's turns in them,
//!       [`data::tokenize`] gives trees of token ids (a prompt with the answers that continue it),
//!       [`data::chat_counts`] counts what a model does not learn or read of them, [`data::pairs`] says which
//!       ranked answers make pairs, [`data::batch`] lays sequences end to end.
//! * [`ops`]: the operations that carry a transformer, over values whose backward pass is ours
//!   ([`ops::backward`]): an operation keeps what its gradients need and no more, adds gradients in place, in
//!   parallel, and skips what is frozen; beside it stands a reference in candle's own operations. candle drops
//!   the gradients of many of its fused operations without a word and computes those of frozen weights; nothing
//!   outside this module calls one of them. Losses are small and stay in candle's operations
//!   ([`ops::Outputs`]).
//! * [`model`]: [`model::architecture`] says what a family is, [`model::family`] reads each one's
//!   `config.json`, of which every field is read, known to change no number, or refused by its name
//!   (`model/config.rs`). [`model::transformer`] is the forward pass, once for all, [`model::layout`] says
//!   who attends to whom, [`model::adapter`] names the sites at which a lightweight method may change the
//!   pass, [`model::sites`] applies what adapters declare: to all rows alike, or to each group of rows its
//!   own. [`model::weight_files`] finds, reads and writes weights; whether embeddings and output matrix are
//!   tied is decided by `config.json` and these files together (`model/tying.rs`).
//! * [`adapt`]: what trains: full weights, or lightweight methods in the forms of PEFT and AdapterHub. The
//!   only place that knows methods by name. Fields of an adapter's configuration are known or refused, as
//!   those of `config.json` are (`adapt/fields.rs`).
//! * [`generate`]: sampling with a key-value cache and continuous batching.
//! * [`train`]: what the stages share: optimizer, schedule, examples by step, in memory or streamed
//!   ([`train::examples`]), metrics, the plan that is printed before a run, progress, the run's folder,
//!   checkpoints ([`train::checkpoint`]), and whether a run learned anything.
//! * [`classifier`]: sequence classifiers of others (toxicity, inference), on the core or, for DeBERTa,
//!   beside it: texts to probabilities of labels.
//! * [`rewards`]: what says how good an answer is: reward models of any tokenizer, classifiers, a command, or
//!   rules that compare it with a column of its row; one source or several together. [`figure`]: curves as SVG.
//! * [`sft`], [`reward`], [`ppo`]: the three stages; [`sample`], [`score`], [`evaluate`], [`export`]: what is
//!   done with a model afterwards.
//! * [`world`]: the generator of the data that ships with the project, and the rule by which its answers are
//!   judged.
//! * [`programs`]: all of these by their names, as `rlhf` and the programs of `stages/` run them.
//!
//! # From a row to a gradient step
//!
//! [`sft::run`] opens its data ([`train::examples`]): the files of the split ([`data::splits`]) in whatever
//! form they have ([`data::table`]). Rows of more than a window are read as they are needed
//! ([`data::window`]), fewer are read at once. Of each row a demonstration is made
//! ([`data::schema::DEMONSTRATIONS`]), whose conversation the chat template renders ([`data::template`]), and
//! of this a token tree ([`data::tokenize::Tokenizer::demonstration`]); each optimizer step takes its
//! examples ([`train::examples::Examples::step`]), packs some at a time ([`model::Model::pack`]), computes
//! hidden states `[tokens, d_model]` ([`model::Model::hidden`]), the log-probabilities of the targets alone
//! ([`model::Model::log_probs`]), a loss of these in candle's operations, its gradients
//! ([`train::optimizer::Optimizer::backward`]), and steps ([`train::optimizer::Optimizer::step`]).
//! [`reward::run`] does the same with scores at each answer's last token and the k-wise loss
//! ([`reward::loss`]). [`ppo::run`] samples answers ([`generate::generate`]), scores them with policy,
//! reference, value model and the sources of rewards ([`rewards`], [`ppo::rollout`]), estimates advantages
//! ([`ppo::advantage`]), and updates ([`ppo::update`], by the losses of [`ppo::objective`]).
//!
//! # Decisions
//!
//! **A batch is a flat stream of tokens.** Sequences lie end to end, without padding, and every linear and norm works on
//! `[tokens, d_model]`. A segment attends causally to itself and to its ancestors, so k answers to a prompt are k segments with one
//! parent, and the prompt is computed once, forward and backward. Batches are filled to a budget of rows.
//!
//! **Only what the loss needs.** Log-probabilities are computed at target positions, fused with the output matrix, in chunks;
//! `[tokens, vocabulary]` is never held. A reward head sees one position an answer.
//!
//! **The backward pass is ours.** candle's clears and adds a tensor for each gradient, on one thread, and
//! keeps every activation until the loss is dropped. Here an operation's step is run once, in the order
//! opposite to that of the pass ([`ops::backward`]), adds to its operands' gradients in place and frees what
//! it kept; a block can be run again instead of being kept (`--gradient-checkpointing`), with equal bits.
//!
//! **Roles share one base.** A [`model::Model`] is base weights, which several roles may share, with an adapter and a head of its own. With
//! a lightweight method, PPO's policy, reference, reward and value models are four small adapters on one copy of the base.
//!
//! **Adapters declare, the transformer applies.** A method says what becomes of a linear, a norm, the embeddings, and which rows and keys stand before a document
//! ([`model::adapter`]). So methods stack, a base's product is computed once for rows of different users, and the transformer knows none of them.
//!
//! **Bit for bit.** Reductions run over fixed chunks, so that the same seed gives the same bytes on any number of threads.
//!
//! **One setting for products.** Products with a model's weights are made in f32, or with operands rounded to
//! bf16 by the kernel that suits the processor ([`ops::precision`]); each kernel has its own bits, the same
//! on any number of threads. The key-value cache of sampling may hold bf16 too
//! ([`generate::CachePrecision`]). All else is f32.
//!
//! **A weight has a precision of its own.** The matrices of a frozen base are kept as they are stored (bf16,
//! f16, GGUF's blocks) or quantised when they are read ([`ops::compact`]), and widened a part at a time for a
//! product; everything else is f32. A product does not know more of a matrix than [`ops::Weight`] says.
//!
//! **A run goes on as if nothing had happened.** Everything that changes from step to step is in a checkpoint ([`train::state`]); a step's examples and
//! random numbers depend on its number alone. So a run that was killed ends in the bytes of one that was not. Another processor (other kernels), another
//! version, or a reward command that is not the same function twice would break that.
//!
//! **Known, or refused.** A field of a configuration, a part of a message, a column or a flag that might change what is computed is either
//! understood or refused by its name; what is left out is counted and printed. A number that is not finite is an error with its place, never a value.
//!
//! candle-transformers is used by tests alone, as an oracle: none of its models can be trained (gradients
//! stop at its fused norms and rotations), there is no GPT-2 in it, and its DeBERTa panics on the convolution
//! of DeBERTa-v2's larger models. Of candle-nn, the differentiable functions of the reference implementations
//! and the benchmark's baseline are used, of candle-core GGUF's blocks: how numbers are quantised, and most
//! ways back.
#![warn(missing_docs)]
#![deny(unsafe_code)]
#![warn(clippy::undocumented_unsafe_blocks)]

pub mod adapt;
pub mod bootstrap;
pub mod classifier;
pub mod data;
pub mod error;
pub mod evaluate;
pub mod export;
pub mod figure;
pub mod files;
pub mod generate;
pub mod gguf;
pub mod limits;
pub mod model;
pub mod numbers;
pub mod ops;
pub mod ppo;
pub mod programs;
pub mod random;
pub mod remote;
pub mod reward;
pub mod rewards;
pub mod sample;
pub mod score;
pub mod settings;
pub mod sft;
pub mod stop;
pub mod train;
pub mod world;

pub use error::{Error, Result};
