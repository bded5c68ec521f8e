//! Prefix tuning (Li & Liang 2021): keys and values before each layer's own, direct or through a perceptron; and P-tuning v2 (Liu et al. 2022), which is the
//! same without perceptron, from random ones on.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use serde_json::json;

use super::base::Base;
use super::peft::{self, AdapterFiles};
use super::prompt_tuning::KEY;
use super::words;
use crate::bail;
use crate::data::batch::Segment;
use crate::error::Result;
use crate::model::adapter::{Adapter, Parameter, Saving};
use crate::model::layout::Layout;
use crate::model::transformer::KeyValueStore;
use crate::model::weights::Weights;
use crate::ops::{self, Activation, Value};
use crate::random;
use crate::settings::{MethodSettings, PromptInit, PromptSettings};

/// `2 layers` matrices `[virtual tokens, kv_heads * head_dim]`: of layer `i` the keys at `2 i`, the values at `2 i + 1`, side by side in one matrix
/// `[virtual tokens, 2 layers * kv_heads * head_dim]`, as PEFT keeps them. Keys are not rotated: they stand in the cache after rotation.
#[derive(Debug, Clone)]
pub struct PrefixTuning {
    /// The matrix under PEFT's key; or the perceptron's tensors by the names that PEFT's encoder has.
    tensors: Weights,
    shape: peft::BaseShape,
}

const EMBEDDING: &str = "embedding.weight";
const PROJECTION: [&str; 4] = ["transform.0.weight", "transform.0.bias", "transform.2.weight", "transform.2.bias"];

impl PrefixTuning {
    /// Prefix tuning: direct, from the keys and values of real words (Li & Liang 2021, section 7.4), or through a perceptron.
    pub fn new(settings: &PromptSettings, base: &Base) -> Result<Self> {
        let shape = peft::BaseShape::of(base.architecture());
        let mut tensors = Weights::default();
        if settings.prefix_projection {
            let hidden = settings.encoder_hidden_size.unwrap_or(shape.kv_width);
            let (d_in, d_out) = (shape.kv_width, 2 * shape.layers * shape.kv_width);
            let rows = [settings.num_virtual_tokens, d_in];
            tensors.set(EMBEDDING, random::normal(&mut base.stream(EMBEDDING), &rows, 1.0, base.device())?);
            let shapes = [vec![hidden, d_in], vec![hidden], vec![d_out, hidden], vec![d_out]];
            for ((name, shape), fan_in) in PROJECTION.into_iter().zip(shapes).zip([d_in, d_in, hidden, hidden]) {
                let bound = 1.0 / (fan_in as f64).sqrt();
                let is_zero = settings.prompt_tuning_init == PromptInit::Zero && name.starts_with("transform.2");
                tensors.set(
                    name,
                    match is_zero {
                        true => Tensor::zeros(shape, DType::F32, base.device())?,
                        false => random::uniform(&mut base.stream(name), &shape, bound, base.device())?,
                    },
                );
            }
        } else {
            let matrix = match words::tokens(settings, base, KEY)? {
                Some(tokens) => activations(base, &tokens)?,
                None => random_matrix(settings, base, &shape)?,
            };
            tensors.set(KEY, matrix);
        }
        Ok(PrefixTuning { tensors: tensors.trainable()?, shape })
    }

    /// P-tuning v2: direct, from random numbers.
    pub fn deep_prompt(settings: &PromptSettings, base: &Base) -> Result<Self> {
        let shape = peft::BaseShape::of(base.architecture());
        let mut tensors = Weights::default();
        tensors.set(KEY, random_matrix(settings, base, &shape)?);
        Ok(PrefixTuning { tensors: tensors.trainable()?, shape })
    }

    /// Reads a prefix in PEFT's form, with the perceptron beside it where it was saved.
    pub fn read(files: &mut AdapterFiles, base: &Base) -> Result<Self> {
        let shape = peft::BaseShape::of(base.architecture());
        let rows = files.config().size("num_virtual_tokens")?;
        let width = 2 * shape.layers * shape.kv_width;
        let matrix = files.take_of_shape(KEY, &[rows, width])?;
        let tensors = match files.encoder(base.device())? {
            Some(tensors) => tensors,
            None => {
                let mut tensors = Weights::default();
                tensors.set(KEY, matrix);
                tensors
            }
        };
        let adapter = PrefixTuning { tensors, shape };
        let found = adapter.matrix()?.dims().to_vec();
        if found != [rows, width] {
            bail!(
                "{}: the saved perceptron gives a prefix of {found:?}, expected {:?}",
                files.path.display(),
                [rows, width]
            );
        }
        Ok(adapter)
    }

    /// The whole prefix, `[virtual tokens, 2 layers * kv_heads * head_dim]`.
    fn matrix(&self) -> Result<Value> {
        if let Some(matrix) = self.tensors.find(KEY) {
            return Ok(Value::from(matrix));
        }
        let get = |name: &str| self.tensors.get(name).map(Value::from);
        let [weight, bias, out_weight, out_bias] = PROJECTION.map(get);
        let inner = ops::linear(&get(EMBEDDING)?, &weight?, Some(&bias?))?; // [virtual tokens, hidden]
        ops::linear(&ops::activate(&inner, Activation::Tanh)?, &out_weight?, Some(&out_bias?))
    }
}

/// Normal numbers with the family's deviation.
fn random_matrix(settings: &PromptSettings, base: &Base, shape: &peft::BaseShape) -> Result<Tensor> {
    let dimensions = [settings.num_virtual_tokens, 2 * shape.layers * shape.kv_width];
    if settings.prompt_tuning_init == PromptInit::Zero {
        return Ok(Tensor::zeros(&dimensions, DType::F32, base.device())?);
    }
    let deviation = base.architecture().initializer_range;
    random::normal(&mut base.stream(KEY), &dimensions, deviation, base.device())
}

/// The keys and values that the base model computes for these words, as if they stood before the text.
fn activations(base: &Base, tokens: &[u32]) -> Result<Tensor> {
    /// Takes what goes by.
    #[derive(Default)]
    struct Witness {
        seen: Vec<Tensor>,
    }
    impl KeyValueStore for Witness {
        fn extend(&mut self, _layer: usize, keys: Tensor, values: Tensor) -> Result<(Tensor, Tensor)> {
            self.seen.extend([keys.contiguous()?, values.contiguous()?]);
            Ok((keys, values))
        }
    }
    let segment = Segment { start: 0, len: tokens.len(), parent: None, stack: 0 };
    let layout = Layout::new(&[segment], &base.model.own_rows());
    let mut witness = Witness::default();
    base.model.hidden_with_store(tokens, &layout, &mut witness)?;
    Ok(Tensor::cat(&witness.seen, 1)?.detach())
}

impl Adapter for PrefixTuning {
    fn prefix_rows(&self) -> usize {
        let matrix = self.tensors.find(KEY).or(self.tensors.find(EMBEDDING));
        matrix.map_or(0, |matrix| matrix.dims()[0])
    }

    fn prefixes(&self) -> Result<Vec<(Value, Value)>> {
        let (matrix, width) = (self.matrix()?, self.shape.kv_width);
        let part = |index: usize| matrix.narrow_columns(index * width, width);
        (0..self.shape.layers).map(|layer| Ok((part(2 * layer)?, part(2 * layer + 1)?))).collect()
    }

    fn parameters(&self) -> usize {
        self.tensors.count()
    }

    fn trainable_parameters(&self) -> Vec<Parameter> {
        let name = |name: &str| if name == KEY { name.to_string() } else { format!("prompt_encoder.{name}") };
        self.tensors.variables().map(|(tensor, variable)| Parameter::new(name(tensor), variable)).collect()
    }

    fn frozen(&self) -> Arc<dyn Adapter> {
        Arc::new(PrefixTuning { tensors: self.tensors.frozen(), ..self.clone() })
    }

    fn trainable(&self, _settings: &MethodSettings) -> Result<Arc<dyn Adapter>> {
        Ok(Arc::new(PrefixTuning { tensors: self.tensors.trainable()?, ..self.clone() }))
    }

    fn method(&self) -> &'static str {
        "prefix-tuning"
    }

    fn note(&self) -> Option<String> {
        let kept = self.prefix_rows() * 2 * self.shape.layers * self.shape.kv_width;
        self.tensors.find(EMBEDDING).map(|_| {
            format!("what trains is a perceptron; the prefix that it makes, all that is needed afterwards, is {kept} numbers")
        })
    }

    fn save(&self, folder: &Path, saving: &Saving) -> Result<()> {
        let hidden = self.tensors.find(PROJECTION[1]).map(|bias| bias.dims()[0]);
        let mut config = json!({
            "peft_type": "PREFIX_TUNING",
            "num_virtual_tokens": self.prefix_rows(),
            "prefix_projection": hidden.is_some(),
            "encoder_hidden_size": hidden.unwrap_or(self.shape.kv_width),
        });
        // PEFT describes the keys and values, not the model, where heads share them.
        self.shape.describe(&mut config, self.shape.kv_width, self.shape.kv_heads);
        peft::write(folder, config, BTreeMap::from([(KEY.to_string(), self.matrix()?.tensor().clone())]), saving)?;
        if hidden.is_some() { peft::write_encoder(folder, &self.tensors) } else { Ok(()) }
    }
}
