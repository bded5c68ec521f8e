//! The metrics of the literature, each a pure function of scores, texts or counts, and each equal to its reference implementation.
//!
//! Nothing here reads a file, runs a model or knows a benchmark; `tests/golden/metrics.py` makes the values that the tests compare
//! with.
//!
//! | module | what it measures |
//! | --- | --- |
//! | [`agreement`] | how well a score tells two classes apart, or follows another score |
//! | [`squad`], [`rouge`] | how much of a reference's words an answer has |
//! | [`multiple_choice`] | whether true choices are more probable than false ones |
//! | [`bradley_terry`] | how strong each of several models is, from who was preferred to whom |
//! | [`toxicity`] | how toxic continuations get at worst, and how often |
//! | [`summac`], on [`sentences`] | whether what is said follows from a source |

pub mod agreement;
pub mod bradley_terry;
pub mod multiple_choice;
pub mod rouge;
pub mod sentences;
pub mod squad;
pub mod summac;
pub mod toxicity;
