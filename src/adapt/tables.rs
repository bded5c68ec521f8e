//! Tables of the base that an adapter's files hold: PEFT stores them where the vocabulary was changed before training, and beside updates of them.

use candle_core::Tensor;

use super::peft::{AdapterFiles, names};
use super::targets;
use crate::bail;
use crate::error::Result;
use crate::model::Model;
use crate::model::architecture::Architecture;
use crate::model::tables::NewTables;
use crate::model::tying::are_equal;
use crate::model::weights::embedding_name;

/// What an adapter's files hold of one table of the base.
#[derive(Default)]
struct Found {
    module: String,
    /// The base's table, as it was in training.
    base: Option<Tensor>,
    /// The adapter's own copy, trained in its place.
    own: Option<Tensor>,
    /// The rows that an update of it has.
    updated_rows: Option<usize>,
}

impl Found {
    /// Takes the base's table out of the files; the adapter's own parts stay there.
    fn take(files: &mut AdapterFiles, module: &str, architecture: &Architecture) -> Result<Self> {
        let key = |part: &str| format!("{module}.{part}");
        let plain = key("weight");
        let is_own = is_saved(files, module, architecture);
        let mut found = Found { module: module.to_string(), ..Found::default() };
        for part in ["original_module.weight", "base_layer.weight", "token_adapter.base_layer.weight"] {
            let table = files.take(&key(part));
            found.base = table.or(found.base);
        }
        if is_own {
            found.own = files.find(&plain);
        } else {
            found.base = files.take(&plain).or(found.base);
        }
        let dimension =
            |key: String, index: usize| files.find(&key).and_then(|update| update.dims().get(index).copied());
        found.updated_rows = dimension(key("lora_embedding_A"), 1).or(dimension(key("lora_B.weight"), 0));
        for table in found.base.iter().chain(&found.own) {
            if table.rank() != 2 || table.dims()[1] != architecture.d_model || table.dims()[0] == 0 {
                bail!(
                    "{}: the table of \"{module}\" has shape {:?}, expected [tokens, {}]; this adapter belongs to another base model",
                    files.path.display(),
                    table.dims(),
                    architecture.d_model
                );
            }
        }
        Ok(found)
    }

    fn rows(&self) -> impl Iterator<Item = usize> {
        self.base.iter().chain(&self.own).map(|table| table.dims()[0]).chain(self.updated_rows)
    }

    /// The base's table, of this name, with as many rows as the adapter's, and whether it is another than the
    /// base's: that which was stored, or the base's own with the adapter's rows after it.
    fn grown(&self, base: &Model, name: &str, rows: usize) -> Result<Option<(Tensor, bool)>> {
        let architecture = base.architecture();
        let own_table = || match name == embedding_name(architecture) {
            true => base.transformer().embeddings().to_tensor(),
            false => base.transformer().output().to_tensor(),
        };
        let known = architecture.vocabulary;
        Ok(match (&self.base, &self.own) {
            (Some(table), _) => Some((table.clone(), !base.weights().was_read_as(name, table)?)),
            (None, _) if known == rows => Some((own_table()?, false)),
            (None, Some(own)) => Some((Tensor::cat(&[&own_table()?, &own.narrow(0, known, rows - known)?], 0)?, true)),
            (None, None) => None,
        })
    }
}

/// Whether an adapter trains its own copy of a table: by `modules_to_save`, which counts for both of two tables that were trained as one.
fn is_saved(files: &AdapterFiles, module: &str, architecture: &Architecture) -> bool {
    let saved = names(&files.config(), "modules_to_save");
    let is_own =
        |module: &str| saved.iter().any(|name| targets::is_saved(architecture, &format!("{module}.weight"), name));
    is_own(module)
        || files.ties_output && (is_own(&targets::embedding(architecture)) || is_own(architecture.names.output_module))
}

/// Takes the tables of the base out of an adapter's files; `None` where they are those that the base has. `adapter` is its place in the stack.
///
/// # Errors
/// Where the vocabulary was changed, and not all of its rows are there.
pub fn take(files: &mut AdapterFiles, base: &Model, adapter: usize) -> Result<Option<NewTables>> {
    let architecture = base.architecture();
    let embedding = Found::take(files, &targets::embedding(architecture), architecture)?;
    let output = match architecture.causal {
        true => Found::take(files, architecture.names.output_module, architecture)?,
        false => Found::default(),
    };
    files.pass_over_copies();
    let path = files.path.display();
    let known = architecture.vocabulary;
    let rows = embedding.rows().chain(output.rows()).max().unwrap_or(known);
    if let Some(other) = embedding.rows().chain(output.rows()).find(|&other| other != rows) {
        bail!(
            "{path}: holds tables of {rows} rows and of {other}; expected one size of the vocabulary; save the adapter again"
        );
    }
    if rows < known {
        bail!(
            "{path}: its tables have {rows} rows, fewer than the {known} tokens of the base model; an adapter whose vocabulary was made smaller is not supported"
        );
    }
    let grown = |missing: &Found| -> Result<NewTables> {
        bail!(
            "{path}: the vocabulary was grown from {known} to {rows} tokens, but there are no rows of \"{}\" for the new ones; save the adapter with all its tables (PEFT: save_embedding_layers=True)",
            missing.module
        )
    };
    if rows == known && embedding.base.is_none() && output.base.is_none() {
        return Ok(None);
    }
    let embedding_name = embedding_name(architecture);
    if architecture.tied_output || !architecture.causal {
        if let (Some(a), Some(b)) = (&embedding.base, &output.base)
            && !are_equal(a, b)?
        {
            bail!(
                "{path}: the base's tables \"{}\" and \"{}\" differ, but the base model ties the two; give the base model that it was trained on",
                embedding.module,
                output.module
            );
        }
        let one = Found {
            base: embedding.base.clone().or(output.base.clone()),
            own: embedding.own.clone().or(output.own.clone()),
            ..Found::default()
        };
        let Some((table, is_new)) = one.grown(base, &embedding_name, rows)? else {
            return grown(&embedding).map(Some);
        };
        return Ok(is_new.then_some(NewTables { adapter, embedding: table, output: None }));
    }
    let Some((table, mut is_new)) = embedding.grown(base, &embedding_name, rows)? else {
        return grown(&embedding).map(Some);
    };
    let mut matrix = None;
    // A classifier may be without an output matrix, and nothing reads one under a head.
    if base.has_output_matrix() {
        match output.grown(base, architecture.names.output, rows)? {
            Some((table, is_other)) => {
                is_new |= is_other;
                matrix = Some(table);
            }
            None if files.config().text("task_type", "")? == "SEQ_CLS" => {}
            None => return grown(&output).map(Some),
        }
    }
    Ok(is_new.then_some(NewTables { adapter, embedding: table, output: matrix }))
}
