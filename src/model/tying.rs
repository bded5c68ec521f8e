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

use candle_core::Tensor;

use super::architecture::Architecture;
use super::weight_files::TensorFiles;
use super::weights::embedding_name;
use crate::error::Result;
use crate::files::warn_once;

/// Corrects [`Architecture::tied_output`] by what is stored, and gives the name on disk of the embedding matrix.
///
/// # Errors
/// Where both matrices are stored and one of them cannot be read.
pub fn decide(files: &mut TensorFiles, architecture: &mut Architecture) -> Result<String> {
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
    architecture.tied_output = files.are_equal(&embedding, &output, prefix)?;
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

/// How many numbers of two matrices are compared at a time.
const PIECE: usize = 1 << 20;

/// Whether two matrices have the same shape and numbers, which are copied piece by piece.
pub fn are_equal(a: &Tensor, b: &Tensor) -> Result<bool> {
    if a.dims() != b.dims() {
        return Ok(false);
    }
    let (a, b, count) = (a.flatten_all()?, b.flatten_all()?, a.elem_count());
    for start in (0..count).step_by(PIECE) {
        let piece = |tensor: &Tensor| tensor.narrow(0, start, PIECE.min(count - start))?.to_vec1::<f32>();
        if piece(&a)? != piece(&b)? {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn matrices_are_equal_where_every_number_of_every_piece_is() -> Result<()> {
        let (rows, columns) = (3, PIECE / 2 + 1); // Three pieces, the last of them short.
        let matrix = |changed: Option<usize>| {
            let number = |place: usize| if Some(place) == changed { -1.0 } else { place as f32 };
            Tensor::from_vec((0..rows * columns).map(number).collect::<Vec<f32>>(), (rows, columns), &Device::Cpu)
        };
        let one = matrix(None)?;
        assert!(are_equal(&one, &matrix(None)?)?);
        assert!(are_equal(&one, &one.t()?.contiguous()?.t()?)?);
        for place in [0, PIECE - 1, PIECE, rows * columns - 1] {
            assert!(!are_equal(&one, &matrix(Some(place))?)?, "{place}");
        }
        assert!(!are_equal(&one, &one.reshape((columns, rows))?)?);
        Ok(())
    }
}
