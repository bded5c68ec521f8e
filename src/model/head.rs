//! What stands on top of a transformer: the head of reward and value models and of classifiers.

mod form;
mod layer;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use candle_core::{Device, Tensor};
use serde_json::Value as Json;

use super::adapter::Parameter;
use super::architecture::{Architecture, HeadForm, Pooling};
use super::weights::{Role, Stored, TensorSpec};
use crate::bail;
use crate::error::Result;
use crate::ops::{self, Activation, Value};
pub use form::Form;
use layer::{HeadNorm, Layer};

/// `y = (W h + b - shift) / divisor`, or the same of `norm(activation(V h + a))` in place of `h`: one number a label for the hidden state `h` that
/// stands for a sequence. A reward or value model has one label.
#[derive(Debug, Clone)]
pub struct Head {
    /// Everything but the tensors.
    pub form: Form,
    /// The hidden layer.
    dense: Option<Layer>,
    /// What its output goes through.
    activation: Activation,
    /// The norm after that (ModernBERT).
    norm: Option<HeadNorm>,
    /// The last layer.
    out: Layer,
}

/// A head that is to be made.
#[derive(Debug, Clone, PartialEq)]
pub struct NewHead {
    /// Which hidden state stands for a sequence; the family's own where absent.
    pub pooling: Option<Pooling>,
    /// Width of the hidden layer: `None` is the family's own head, `Some(0)` a linear one.
    pub hidden: Option<usize>,
    /// What the labels are called; empty for a reward.
    pub labels: Vec<String>,
    /// Seed of the new weights.
    pub seed: u64,
}

/// Layers of a head that is not the family's own in `transformers`, which therefore is not to take it for its own.
const OWN_DENSE: &str = "probe.dense";
const OWN_OUT: &str = "probe.out_proj";

/// Names of all layers that a head of this architecture may have, norms apart.
fn layer_names(architecture: &Architecture) -> [Option<&'static str>; 4] {
    let HeadForm { hidden, out, .. } = architecture.names.head;
    [hidden.map(|hidden| hidden.name), Some(out), Some(OWN_DENSE), Some(OWN_OUT)]
}

fn norm_name(architecture: &Architecture) -> Option<&'static str> {
    architecture.names.head.hidden.and_then(|hidden| hidden.norm)
}

/// The tensors of the heads whose shapes `shape_of` knows: of the family's own head and of one of another form.
pub fn head_specs(architecture: &Architecture, shape_of: impl Fn(&str) -> Option<Vec<usize>>) -> Vec<TensorSpec> {
    let names = &architecture.names;
    let found = |name: &str| shape_of(name).or_else(|| shape_of(name.strip_prefix(names.prefix).unwrap_or(name)));
    let layers = layer_names(architecture).into_iter().flatten().map(|name| (name, Role::Linear));
    let norm = norm_name(architecture).map(|name| (name, Role::NormWeight));
    let mut specs = Vec::new();
    for (layer, of_weight) in layers.chain(norm) {
        for (part, role) in [("weight", of_weight), ("bias", Role::Bias)] {
            let name = format!("{layer}.{part}");
            if let Some(shape) = found(&name) {
                specs.push(TensorSpec { name, shape, role, stored: Stored::AsIs });
            }
        }
    }
    specs
}

/// Whether a tensor belongs to a head.
pub fn is_head_tensor(architecture: &Architecture, name: &str) -> bool {
    let layer = name.rsplit_once('.').map_or(name, |(layer, _)| layer);
    layer_names(architecture).contains(&Some(layer)) || norm_name(architecture) == Some(layer)
}

impl Head {
    /// The frozen head that these tensors hold, if they hold one: `find` gives a tensor by its name. Without
    /// a form it is one that `transformers` saved, with the padding token `pad`.
    pub fn find(
        architecture: &Architecture,
        form: Option<Form>,
        pad: Option<u32>,
        find: impl Fn(&str) -> Option<Tensor>,
    ) -> Option<Self> {
        let HeadForm { pooling, hidden, out, .. } = architecture.names.head;
        let layer = |name: &str| Layer::find(name, &find);
        let pad_token_id = pad.filter(|_| pooling == Pooling::Last);
        let form = form.unwrap_or_else(|| Form { pad_token_id, ..Form::new(pooling, Vec::new()) });
        if let Some(out) = layer(OWN_OUT) {
            return Some(Head { form, dense: layer(OWN_DENSE), activation: Activation::Tanh, norm: None, out });
        }
        let bare = Head { form, out: layer(out)?, dense: None, activation: Activation::Tanh, norm: None };
        let Some(hidden) = hidden else { return Some(bare) };
        let norm = hidden.norm.and_then(layer).map(|layer| HeadNorm { layer, epsilon: architecture.norm_epsilon });
        Some(Head { dense: layer(hidden.name), activation: hidden.activation, norm, ..bare })
    }

    /// The head with the hidden layer that the base model holds, where the family's has one and this one has not: PEFT leaves BERT's pooler with the base.
    pub fn completed_by(mut self, architecture: &Architecture, find: impl Fn(&str) -> Option<Tensor>) -> Self {
        if let Some(hidden) = architecture.names.head.hidden.filter(|_| self.is_of_the_family(architecture)) {
            self.dense = self.dense.or_else(|| Layer::find(hidden.name, &find));
            self.norm = self.norm.or_else(|| {
                let layer = Layer::find(hidden.norm?, &find)?;
                Some(HeadNorm { layer, epsilon: architecture.norm_epsilon })
            });
        }
        self
    }

    /// A new head. Its last layer is normal with standard deviation `1 / (d + 1)`, its bias 0, so that it says next to
    /// nothing at first: a loss starts at that of chance. (`1 / sqrt(d + 1)`, as of Stiennon et al. 2020, gives numbers
    /// of variance 1 where hidden states have it. Those of SmolLM2 are several times larger: a classifier began with a
    /// loss of 2.8, and most of its first steps undid that.) A hidden layer is `pretrained`, where the base has one, or
    /// normal with the family's standard deviation.
    pub fn new(
        architecture: &Architecture,
        new: &NewHead,
        pretrained: impl Fn(&str) -> Option<Tensor>,
        device: &Device,
    ) -> Result<Self> {
        let own = architecture.names.head;
        let pooling = new.pooling.unwrap_or(own.pooling);
        let is_own = pooling == own.pooling && new.hidden.is_none();
        let d_model = architecture.d_model;
        let own_hidden = own.hidden.filter(|_| is_own);
        let hidden = match own_hidden {
            Some(hidden) => Some((hidden.name, d_model, hidden.bias)),
            None if is_own => None,
            None => new.hidden.filter(|&width| width > 0).map(|width| (OWN_DENSE, width, true)),
        };
        let dense = match hidden {
            None => None,
            Some((name, width, bias)) => {
                let shape = [width, d_model];
                let layer = Layer::random(name, shape, bias, architecture.initializer_range, new.seed, device)?;
                let weight = pretrained(&format!("{name}.weight"));
                let bias_of_base = pretrained(&format!("{name}.bias")).filter(|_| bias);
                Some(match weight.filter(|_| bias_of_base.is_some() == bias) {
                    Some(weight) => Layer { weight, bias: bias_of_base, ..layer },
                    None => layer,
                })
            }
        };
        let norm = match own_hidden.and_then(|hidden| hidden.norm) {
            Some(name) => Some(HeadNorm::new(name, architecture, pretrained, device)?),
            None => None,
        };
        let activation = own_hidden.map_or(Activation::Tanh, |hidden| hidden.activation);
        let width = hidden.map_or(d_model, |(_, width, _)| width);
        let (name, bias) = if is_own { (own.out, own.out_bias) } else { (OWN_OUT, true) };
        let deviation = 1.0 / (width as f64 + 1.0);
        let labels = new.labels.len().max(1);
        let out = Layer::random(name, [labels, width], bias, deviation, new.seed, device)?;
        let form = Form::new(pooling, new.labels.clone());
        Ok(Head { form, dense, activation, norm, out })
    }

    /// Refuses a head that lacks a layer or does not fit the model, or has not this many labels where a number is asked for.
    pub fn check(&self, architecture: &Architecture, labels: Option<usize>, source: &Path) -> Result<()> {
        if let Some(hidden) = architecture.names.head.hidden.filter(|_| self.is_of_the_family(architecture)) {
            let missing = if self.dense.is_none() { Some(hidden.name) } else { None };
            if let Some(missing) = missing.or_else(|| hidden.norm.filter(|_| self.norm.is_none())) {
                bail!(
                    "{}: tensor \"{missing}.weight\" is missing, through which \"{}.weight\" reads the model; save the classifier with all of its head",
                    source.display(),
                    self.out.name
                );
            }
        }
        if let Some(HeadNorm { layer: Layer { name, weight, bias, .. }, .. }) = &self.norm {
            let mut shapes = std::iter::once(weight).chain(bias).map(Tensor::dims);
            if let Some(shape) = shapes.find(|shape| *shape != [architecture.d_model]) {
                bail!(
                    "{}: tensor \"{name}.weight\" or its bias has shape {shape:?}, expected [{}]; this head belongs to another base model",
                    source.display(),
                    architecture.d_model
                );
            }
        }
        let mut width = architecture.d_model;
        for Layer { name, weight, bias, .. } in self.dense.iter().chain([&self.out]) {
            let fits = weight.rank() == 2 && weight.dims()[1] == width;
            if !fits || bias.as_ref().is_some_and(|bias| bias.dims() != &weight.dims()[..1]) {
                bail!(
                    "{}: tensor \"{name}.weight\" has shape {:?}, expected [.., {width}] and a bias that fits it; this head belongs to another base model",
                    source.display(),
                    weight.dims()
                );
            }
            width = weight.dims()[0];
        }
        if let Some(labels) = labels
            && self.labels() != labels
        {
            bail!(
                "{}: tensor \"{}.weight\" is a classifier of {} labels, expected {labels}; give a model with {labels}, or one without a head",
                source.display(),
                self.out.name,
                self.labels()
            );
        }
        Ok(())
    }

    /// The head with the labels' names that a `config.json` of `transformers` gives them, where it has none of its own.
    pub fn with_labels_of(mut self, config: &Json) -> Self {
        let names = config.get("id2label").and_then(Json::as_object);
        let name = |index: usize| names?.get(&index.to_string())?.as_str().map(String::from);
        let names: Option<Vec<String>> = (0..self.labels()).map(name).collect();
        // `LABEL_0` is what `transformers` calls a label without a name.
        if let Some(names) = names.filter(|names| names.iter().any(|name| !name.starts_with("LABEL_")))
            && self.form.labels.is_empty()
        {
            self.form.labels = names;
        }
        self
    }

    /// Refuses classes that are not those of the head, in its order.
    pub fn check_labels(&self, labels: &[String], source: &Path) -> Result<()> {
        if !self.form.labels.is_empty() && self.form.labels != labels {
            bail!(
                "{}: its head tells the classes {} apart, in this order; the run has {}; give --labels {}, or a model without a head",
                source.display(),
                self.form.labels.join(", "),
                labels.join(", "),
                self.form.labels.join(",")
            );
        }
        Ok(())
    }

    /// Refuses a shape that was asked of a new head where the model has one of another shape already.
    pub fn check_shape(&self, pooling: Option<Pooling>, hidden: Option<usize>, source: &Path) -> Result<()> {
        let own_hidden = self.dense.as_ref().map_or(0, |dense| dense.weight.dims()[0]);
        if let Some(pooling) = pooling.filter(|&pooling| pooling != self.form.pooling) {
            bail!(
                "{}: --pooling {} has no effect: the model has a head already, which reads {}; leave the flag out, or give a model without a head",
                source.display(),
                pooling.name(),
                self.form.pooling.name()
            );
        }
        if let Some(hidden) = hidden.filter(|&hidden| hidden != own_hidden) {
            bail!(
                "{}: --probe-hidden-size {hidden} has no effect: the model has a head already, with a hidden layer of {own_hidden}; leave the flag out, or give a model without a head",
                source.display()
            );
        }
        Ok(())
    }

    /// Number of labels.
    pub fn labels(&self) -> usize {
        self.out.weight.dims()[0]
    }

    /// Number of scalars.
    pub fn parameters(&self) -> usize {
        self.tensors().values().map(Tensor::elem_count).sum()
    }

    /// A copy that trains.
    pub fn trainable(&self) -> Result<Self> {
        Ok(Head {
            form: self.form.clone(),
            dense: self.dense.as_ref().map(Layer::trainable).transpose()?,
            activation: self.activation,
            norm: self.norm.as_ref().map(HeadNorm::trainable).transpose()?,
            out: self.out.trainable()?,
        })
    }

    /// Makes every number of the trained last layer 0.
    pub fn set_to_zero(&mut self) -> Result<()> {
        for Parameter { variable, .. } in &self.out.variables {
            variable.set(&variable.as_tensor().zeros_like()?)?;
        }
        Ok(())
    }

    /// The same storage seen as frozen.
    pub fn frozen(&self) -> Self {
        Head {
            form: self.form.clone(),
            dense: self.dense.as_ref().map(Layer::frozen),
            norm: self.norm.as_ref().map(|norm| HeadNorm { layer: norm.layer.frozen(), ..*norm }),
            out: self.out.frozen(),
            activation: self.activation,
        }
    }

    /// What trains.
    pub fn trainable_parameters(&self) -> impl Iterator<Item = Parameter> + '_ {
        self.layers().flat_map(|layer| layer.variables.iter().cloned())
    }

    /// Its tensors by their names on disk.
    pub fn tensors(&self) -> BTreeMap<String, Tensor> {
        let of_layer = |layer: &Layer| {
            let bias = layer.bias.as_ref().map(|bias| (format!("{}.bias", layer.name), bias.clone()));
            std::iter::once((format!("{}.weight", layer.name), layer.weight.clone())).chain(bias).collect::<Vec<_>>()
        };
        self.layers().flat_map(of_layer).collect()
    }

    /// Name of its last layer on disk.
    pub fn out_name(&self) -> &str {
        &self.out.name
    }

    /// The modules that hold its layers. RoBERTa's are all within `classifier`, which PEFT stores whole by itself: it cannot also store parts.
    pub fn modules(&self) -> Vec<&str> {
        const WHOLE: &str = "classifier";
        let within = |layer: &Layer| layer.name.strip_prefix(WHOLE).is_some_and(|rest| rest.starts_with('.'));
        if self.layers().all(within) { vec![WHOLE] } else { self.layers().map(|layer| layer.name.as_str()).collect() }
    }

    /// All layers, the norm too.
    fn layers(&self) -> impl Iterator<Item = &Layer> {
        self.dense.iter().chain(self.norm.iter().map(|norm| &norm.layer)).chain(std::iter::once(&self.out))
    }

    /// Whether `transformers`' classifier of the family computes the same.
    pub fn is_of_the_family(&self, architecture: &Architecture) -> bool {
        self.out.name == architecture.names.head.out
    }

    /// The labels' numbers `[n, labels]` for hidden states `[n, d_model]`.
    pub fn forward(&self, hidden: &Value) -> Result<Value> {
        let inner = match &self.dense {
            Some(dense) => ops::activate(&dense.forward(hidden)?, self.activation)?,
            None => hidden.clone(),
        }; // [n, width]
        let inner = self.norm.as_ref().map_or(Ok(inner.clone()), |norm| norm.forward(&inner))?;
        let out = self.out.forward(&inner)?; // [n, labels]
        let Form { shift, divisor, .. } = self.form;
        let out = match shift == 0.0 {
            true => out,
            false => out.add_to_columns(&Value::constant(Tensor::full(-shift, self.labels(), hidden.device())?))?,
        };
        if divisor == 1.0 { Ok(out) } else { out.scale(1.0 / f64::from(divisor)) }
    }

    /// The hidden states that stand for sequences, `[sequences, d_model]`: `tokens` are those of all rows,
    /// `rows` the rows of each sequence's parts.
    pub fn pool(&self, hidden: &Value, tokens: &[u32], rows: &[[Range<usize>; 2]]) -> Result<Value> {
        let without_padding: Vec<[Range<usize>; 2]>;
        let rows = match self.form.pad_token_id {
            Some(pad) if self.form.pooling == Pooling::Last => {
                without_padding = rows.iter().map(|rows| up_to_padding(tokens, pad, rows)).collect();
                &without_padding[..]
            }
            _ => rows,
        };
        let one = |rows: &[Range<usize>; 2]| match self.form.pooling {
            Pooling::First => rows.iter().find(|part| !part.is_empty()).map_or(0, |part| part.start),
            _ => rows.iter().rev().find(|part| !part.is_empty()).map_or(0, |part| part.end - 1),
        };
        if self.form.pooling == Pooling::Mean {
            return ops::mean_rows(hidden, rows);
        }
        let rows: Vec<u32> = rows.iter().map(|rows| one(rows) as u32).collect();
        hidden.select_rows(&rows)
    }
}

/// The parts of a sequence up to its last token that is not `pad`; its first token where there is no other.
fn up_to_padding(tokens: &[u32], pad: u32, rows: &[Range<usize>; 2]) -> [Range<usize>; 2] {
    let last = |part: &Range<usize>| part.clone().rev().find(|&row| tokens[row] != pad);
    let [first, second] = rows;
    match (last(first), last(second)) {
        (_, Some(row)) => [first.clone(), second.start..row + 1],
        (Some(row), None) => [first.start..row + 1, 0..0],
        (None, None) => {
            let start = if first.is_empty() { second.start } else { first.start };
            [start..start + 1, 0..0]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// The rule of `transformers`: `(arange(length) * (ids != pad)).argmax()`.
        #[test]
        fn the_row_that_is_read_is_the_last_one_without_padding(
            tokens in prop::collection::vec(0u32..3, 1..12), start in 0usize..4, split in 0usize..12
        ) {
            let whole = start..start + tokens.len();
            let middle = start + split.min(tokens.len());
            let all: Vec<u32> = std::iter::repeat_n(7, start).chain(tokens.iter().copied()).collect();
            let parts = up_to_padding(&all, 0, &[whole.start..middle, middle..whole.end]);
            let last = parts.iter().rev().find(|part| !part.is_empty()).map(|part| part.end - 1);
            // The first of the largest products.
            let products: Vec<usize> = tokens.iter().enumerate().map(|(at, &id)| if id == 0 { 0 } else { at }).collect();
            let largest = *products.iter().max().unwrap();
            let expected = products.iter().position(|&product| product == largest).unwrap();
            prop_assert_eq!(last, Some(start + expected));
        }
    }
}
