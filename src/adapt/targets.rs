//! Which layers of a model a method changes, by PEFT's rules for names.

use std::collections::BTreeSet;

use fancy_regex::Regex;
use serde_json::Value;

use super::peft;
use crate::bail;
use crate::error::{Error, Result};
use crate::model::architecture::{Architecture, Config};
use crate::model::weights::{Role, tensor_specs};

/// Every linear of every block; the output matrix and heads are none of them.
pub const ALL_LINEAR: &str = "all-linear";

/// A linear of a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetLinear {
    /// Its name.
    pub name: String,
    /// Output width.
    pub d_out: usize,
    /// Input width.
    pub d_in: usize,
}

/// All linears of the blocks.
pub fn linears(architecture: &Architecture) -> Vec<TargetLinear> {
    (tensor_specs(architecture).into_iter())
        .filter(|spec| matches!(spec.role, Role::Linear | Role::ResidualLinear))
        .map(|spec| TargetLinear { name: module(&spec.name), d_out: spec.shape[0], d_in: spec.shape[1] })
        .collect()
}

/// The name of the token embeddings.
pub fn embedding(architecture: &Architecture) -> String {
    let names = &architecture.names;
    module(&format!("{}{}", names.prefix, names.embeddings))
}

/// The output matrix as a linear, by its module's name.
pub fn output_linear(architecture: &Architecture) -> TargetLinear {
    let name = architecture.names.output_module.to_string();
    TargetLinear { name, d_out: architecture.vocabulary, d_in: architecture.d_model }
}

/// The output matrix beside the embeddings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Its module in `transformers`, by which adapters name it.
    pub module: String,
    /// The weight of that module.
    pub module_weight: String,
    /// The tensor in the base's weights.
    pub tensor: String,
}

impl Output {
    /// That of a model.
    pub fn of(architecture: &Architecture) -> Self {
        let module = architecture.names.output_module.to_string();
        Output { module_weight: format!("{module}.weight"), module, tensor: architecture.names.output.to_string() }
    }

    /// Whether a name of a target means it; that of its tensor counts too (GPT-NeoX's `embed_out`).
    pub fn is_target(&self, target: &str) -> bool {
        target != ALL_LINEAR && (is_target(&self.module, target) || is_target(&module(&self.tensor), target))
    }
}

/// PEFT's rule for `modules_to_save`: a module whose name ends in `saved`, and all tensors in it.
pub fn is_saved(architecture: &Architecture, tensor: &str, saved: &str) -> bool {
    let output = Output::of(architecture);
    let saved = if module(&output.tensor) == saved { &output.module } else { saved };
    let parts = tensor.match_indices('.').map(|(end, _)| &tensor[..end]);
    !saved.is_empty() && parts.into_iter().any(|module| module.ends_with(saved))
}

fn module(tensor: &str) -> String {
    tensor.trim_end_matches(".weight").to_string()
}

/// What `target_modules` says in an adapter's configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Targets {
    /// Names: the whole of a layer's, or its end after a dot.
    Names(Vec<String>),
    /// A regular expression for the whole name.
    Expression(String),
}

impl Targets {
    /// Whether a layer of this name is meant.
    pub fn matches(&self, name: &str) -> Result<bool> {
        match self {
            Targets::Names(targets) => Ok(targets.iter().any(|target| is_target(name, target))),
            Targets::Expression(expression) if expression == ALL_LINEAR => Ok(true),
            Targets::Expression(expression) => matches_expression(&format!("^(?:{expression})$"), name),
        }
    }
}

/// Which layers an adapter's configuration selects.
pub struct Selection {
    /// Those that get an update; absent where PEFT chooses by the family.
    pub targets: Option<Targets>,
    /// Those that do not.
    pub excluded: Option<Targets>,
    /// The blocks that do, where these are not all.
    pub layers: Option<Vec<u64>>,
    /// What the list of blocks is called; any name where there is none.
    pub layers_pattern: Vec<String>,
}

impl Selection {
    /// That of an adapter's configuration.
    pub fn read(config: &Config) -> Result<Self> {
        let some = |field: &str| config.get(field).map(|_| peft::targets(config, field));
        let numbers = |value: &Value| match value {
            Value::Array(values) => values.iter().map(Value::as_u64).collect::<Option<Vec<u64>>>(),
            value => value.as_u64().map(|number| vec![number]),
        };
        let layers = match config.get("layers_to_transform") {
            None => None,
            Some(value) => match numbers(value) {
                // As in PEFT, an empty list is none.
                Some(numbers) => Some(numbers).filter(|numbers| !numbers.is_empty()),
                None => bail!("{}: field \"layers_to_transform\" is {value}, expected numbers of blocks", config.file),
            },
        };
        Ok(Selection {
            targets: some("target_modules"),
            excluded: some("exclude_modules"),
            layers,
            layers_pattern: peft::names(config, "layers_pattern"),
        })
    }

    /// Whether a layer of this name gets an update (PEFT's `check_target_module_exists`).
    pub fn selects(&self, name: &str) -> Result<bool> {
        if self.excluded.as_ref().map_or(Ok(false), |excluded| excluded.matches(name))? {
            return Ok(false);
        }
        if !self.targets.as_ref().map_or(Ok(true), |targets| targets.matches(name))? {
            return Ok(false);
        }
        let Some(layers) = &self.layers else { return Ok(true) };
        let parts: Vec<&str> = name.split('.').collect();
        let is_list =
            |list: &str| self.layers_pattern.is_empty() || self.layers_pattern.iter().any(|name| name == list);
        let block = parts.windows(2).rev().find_map(|pair| pair[1].parse::<u64>().ok().filter(|_| is_list(pair[0])));
        Ok(block.is_some_and(|block| layers.contains(&block)))
    }
}

/// The linears that `targets` name. The error of a name that stands for none lists those that there are.
pub fn chosen(architecture: &Architecture, targets: &Targets, flag: &str) -> Result<Vec<TargetLinear>> {
    let all = linears(architecture);
    if let Targets::Names(targets) = targets {
        for target in targets {
            let is_table = is_target(&embedding(architecture), target) || Output::of(architecture).is_target(target);
            if !all.iter().any(|linear| is_target(&linear.name, target)) && !is_table {
                let names: BTreeSet<&str> = all.iter().filter_map(|linear| linear.name.rsplit('.').next()).collect();
                let names: Vec<&str> = names.into_iter().collect();
                bail!(
                    "{flag}: no layer is called \"{target}\"; this model has {} (or use {ALL_LINEAR})",
                    names.join(", ")
                );
            }
        }
    }
    let mut chosen = Vec::new();
    for linear in all {
        if targets.matches(&linear.name)? {
            chosen.push(linear);
        }
    }
    Ok(chosen)
}

/// Whether a module trains as a whole, so that it has no update of its own, as in PEFT.
pub fn is_whole(architecture: &Architecture, module: &str, modules_to_save: &[String]) -> bool {
    modules_to_save.iter().any(|saved| is_saved(architecture, &format!("{module}.weight"), saved))
}

/// PEFT's rule: the whole name, or its end after a dot.
pub fn is_target(name: &str, target: &str) -> bool {
    target == ALL_LINEAR || name == target || name.strip_suffix(target).is_some_and(|rest| rest.ends_with('.'))
}

/// The number that the first fitting pattern has for a layer (PEFT's `rank_pattern`: `(.*\.)?(pattern)$`).
pub fn patterned(patterns: &[crate::settings::Pattern], name: &str, default: f64) -> Result<f64> {
    for pattern in patterns {
        if matches_expression(&format!(r"^(?:.*\.)?(?:{})$", pattern.name), name)? {
            return Ok(pattern.number);
        }
    }
    Ok(default)
}

fn matches_expression(expression: &str, name: &str) -> Result<bool> {
    let wrong = |error| Error::input(format!("\"{expression}\" is not a regular expression: {error}"));
    Regex::new(expression).and_then(|regex| regex.is_match(name)).map_err(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::Pattern;

    #[test]
    fn names_match_whole_or_after_a_dot_and_expressions_match_all() -> Result<()> {
        assert!(is_target("model.layers.0.self_attn.q_proj", "q_proj") && is_target("q_proj", "q_proj"));
        assert!(!is_target("model.layers.0.self_attn.eq_proj", "q_proj"));
        let expression = Targets::Expression(r".*\.0\..*(q|v)_proj".to_string());
        assert!(expression.matches("model.layers.0.self_attn.v_proj")?);
        assert!(!expression.matches("model.layers.1.self_attn.v_proj")?);
        assert!(Targets::Expression("(".to_string()).matches("x").is_err());
        Ok(())
    }

    #[test]
    fn a_selection_is_by_targets_exclusions_and_blocks() -> Result<()> {
        let names = |names: &[&str]| Targets::Names(names.iter().map(|name| name.to_string()).collect());
        let all = Selection {
            targets: Some(names(&["q_proj", "v_proj"])),
            excluded: Some(Targets::Expression(r".*\.2\..*".to_string())),
            layers: Some(vec![1, 2]),
            layers_pattern: Vec::new(),
        };
        let name = |block: usize, linear: &str| format!("model.layers.{block}.self_attn.{linear}");
        assert!(all.selects(&name(1, "q_proj"))?);
        assert!(!all.selects(&name(0, "q_proj"))? && !all.selects(&name(1, "k_proj"))?);
        assert!(!all.selects(&name(2, "q_proj"))? && !all.selects("lm_head.q_proj")?);
        let other_list = Selection { layers_pattern: vec!["h".to_string()], ..all };
        assert!(!other_list.selects(&name(1, "q_proj"))? && other_list.selects("transformer.h.1.q_proj")?);
        Ok(())
    }

    #[test]
    fn the_first_fitting_pattern_counts() -> Result<()> {
        let patterns = [
            Pattern { name: r"layers\.0\..*q_proj".to_string(), number: 2.0 },
            Pattern { name: "q_proj".to_string(), number: 4.0 },
        ];
        assert_eq!(patterned(&patterns, "model.layers.0.self_attn.q_proj", 8.0)?, 2.0);
        assert_eq!(patterned(&patterns, "model.layers.1.self_attn.q_proj", 8.0)?, 4.0);
        assert_eq!(patterned(&patterns, "model.layers.1.self_attn.v_proj", 8.0)?, 8.0);
        Ok(())
    }
}
