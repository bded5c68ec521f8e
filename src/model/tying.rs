//! Whether the output matrix of a model is its embedding matrix, decided once: by `config.json` and by the weights' files together, as
//! `transformers` 5 does.
//!
//! | config.json | stored | in memory |
//! | --- | --- | --- |
//! | tied | one of the two, under either name | one matrix, which serves as both |
//! | tied | both, equal | one matrix |
//! | tied | both, different | two matrices, with a warning |
//! | not tied | both | two matrices |
//! | not tied | one | an error that names the other |

use candle_core::{Device, Tensor};

use super::architecture::Architecture;
use super::weight_files::TensorFiles;
use super::weights::{Role, Stored, TensorSpec, embedding_name};
use crate::error::Result;
use crate::files::warn_once;

/// Corrects [`Architecture::tied_output`] by what is stored, and gives the name on disk of the embedding matrix.
///
/// # Errors
/// Where both matrices are stored and one of them cannot be read.
pub fn decide(files: &mut TensorFiles, architecture: &mut Architecture, device: &Device) -> Result<String> {
    let embedding = embedding_name(architecture);
    let Some(output) = stored_output(files, architecture).filter(|_| architecture.tied_output) else {
        return Ok(embedding);
    };
    let prefix = architecture.names.prefix;
    if !files.holds(&embedding, prefix) {
        return Ok(output);
    }
    // An encoder's output matrix is not read.
    if !architecture.causal {
        return Ok(embedding);
    }
    let mut read = |name: &str| -> Result<Tensor> {
        let shape = vec![architecture.vocabulary, architecture.d_model];
        let spec = TensorSpec { name: name.to_string(), shape, role: Role::Embedding, stored: Stored::AsIs };
        Ok(files.read(&spec, prefix, device)?.0)
    };
    architecture.tied_output = are_equal(&read(&embedding)?, &read(&output)?)?;
    if !architecture.tied_output {
        warn_once(&format!(
            "warning: {}: config.json says that the output matrix is tied to the embeddings, but \"{embedding}\" and \"{output}\" are both stored \
             and differ; both are used, as in transformers; set tie_word_embeddings to false to say so",
            files.folder().display()
        ));
    }
    Ok(embedding)
}

/// The name of the output matrix on disk, if it is stored: that of the family's files, or the one that its module has in `transformers`.
pub fn stored_output(files: &TensorFiles, architecture: &Architecture) -> Option<String> {
    let names = &architecture.names;
    [names.output.to_string(), format!("{}.weight", names.output_module)]
        .into_iter()
        .find(|name| files.holds(name, names.prefix))
}

/// Whether two matrices have the same shape and numbers.
pub fn are_equal(a: &Tensor, b: &Tensor) -> Result<bool> {
    Ok(a.dims() == b.dims() && a.flatten_all()?.to_vec1::<f32>()? == b.flatten_all()?.to_vec1::<f32>()?)
}
