//! Rotary positions as `config.json` describes them, by the rules of `transformers` 5.24 (`modeling_rope_utils.py`).

use std::f64::consts::PI;

use serde_json::{Map, Value};

use crate::bail;
use crate::error::Result;
use crate::model::architecture::{Config, Rotary, RotaryForm};
use crate::model::rotary::{Frequencies, frequencies};

/// What a family says of its rotations beside the file.
pub(super) struct Defaults {
    /// The base where the file has none.
    pub theta: f64,
    /// What the base is called outside `rope_parameters`.
    pub theta_field: &'static str,
    /// What the rotated share of a head is called there, and its default; none where whole heads are rotated.
    pub share: Option<(&'static str, f64)>,
    /// `original_max_position_embeddings` where the file has none.
    pub original_length: Option<usize>,
    /// Whether LongRoPE is the only scaling, also under its older names `su` and `yarn` (Phi-3).
    pub only_long: bool,
}

impl Default for Defaults {
    fn default() -> Self {
        Defaults { theta: 10_000.0, theta_field: "rope_theta", share: None, original_length: None, only_long: false }
    }
}

/// Sizes that rotations depend on.
pub(super) struct Sizes {
    pub head_dim: usize,
    pub layers: usize,
    /// `max_position_embeddings`.
    pub longest: usize,
}

/// What frequencies are made from beside the description itself.
struct Setting<'a> {
    theta: f64,
    head_dim: usize,
    /// The rotated share of a head where the description names none; none where whole heads are rotated.
    share: Option<f64>,
    /// `max_position_embeddings`.
    longest: usize,
    /// What counts over the description's `original_max_position_embeddings`.
    original_length: Option<usize>,
    /// The description that `truncate` is read from; by kinds of layers none is.
    truncates: Option<bool>,
    defaults: &'a Defaults,
}

/// Layers that all rotate alike, as `rope_scaling` (which counts first, whole) or `rope_parameters` says; the base and the rotated share
/// may be outside of both.
pub(super) fn rotary(config: &Config, sizes: &Sizes, defaults: &Defaults) -> Result<Rotary> {
    let described = [config.object("rope_scaling")?, config.object("rope_parameters")?];
    let nothing = Value::Object(Map::new());
    let is_there = |config: &Config| config.json.as_object().is_some_and(|fields| !fields.is_empty());
    let rope = described.into_iter().flatten().find(is_there).unwrap_or(Config::new(&nothing, config.file.clone()));
    let theta = config.positive(defaults.theta_field, defaults.theta)?;
    let share = match defaults.share {
        Some((field, share)) => Some(config.number(field, share)?),
        None => None,
    };
    let whole = config.number("partial_rotary_factor", 1.0)?;
    if defaults.share.is_none() && whole != 1.0 {
        bail!(
            "{}: field \"partial_rotary_factor\" is {whole}, expected 1; this family rotates whole heads",
            config.file
        );
    }
    let setting = Setting {
        theta: rope.positive("rope_theta", theta)?,
        head_dim: sizes.head_dim,
        share,
        longest: sizes.longest,
        original_length: config.optional_size("original_max_position_embeddings")?.or(defaults.original_length),
        truncates: Some(rope.flag("truncate", true)?),
        defaults,
    };
    Ok(Rotary::alike(form(&rope, &setting)?, sizes.layers))
}

/// A family whose sliding layers rotate in another way than the others.
pub(super) struct Kinds<'a> {
    /// Whether each layer slides.
    pub sliding: &'a [bool],
    /// The base of full and of sliding layers, where `rope_parameters` names none.
    pub thetas: [f64; 2],
    /// Whether `rope_scaling` is of full and of sliding layers.
    pub scaled: [bool; 2],
    /// `max_position_embeddings` where the file has none.
    pub longest: usize,
}

/// Layers that rotate by their kind, as `rope_parameters.full_attention` and `rope_parameters.sliding_attention` say, over which `rope_scaling`
/// counts field by field.
pub(super) fn rotary_by_kind(config: &Config, head_dim: usize, kinds: &Kinds) -> Result<Rotary> {
    let parameters = config.object("rope_parameters")?;
    let scaling = config.object("rope_scaling")?;
    let longest = config.optional_size("max_position_embeddings")?.unwrap_or(kinds.longest);
    let defaults = Defaults::default();
    let mut forms = Vec::new();
    for (index, kind) in ["full_attention", "sliding_attention"].into_iter().enumerate() {
        let own = match &parameters {
            Some(parameters) => parameters.object(kind)?,
            None => None,
        };
        let mut fields: Map<String, Value> = own.and_then(|own| own.json.as_object().cloned()).unwrap_or_default();
        if let Some(scaling) = scaling.as_ref().filter(|_| kinds.scaled[index]) {
            fields.extend(scaling.json.as_object().cloned().unwrap_or_default());
        }
        let described = Value::Object(fields);
        let rope = Config::new(&described, format!("{} (rope_parameters.{kind})", config.file));
        let setting = Setting {
            theta: rope.positive("rope_theta", kinds.thetas[index])?,
            head_dim,
            share: None,
            longest,
            original_length: None,
            truncates: None,
            defaults: &defaults,
        };
        rope.ignore(&["truncate"]);
        forms.push(form(&rope, &setting)?);
    }
    if let Some(parameters) = &parameters {
        parameters.check_all_read("the rotations of this family, which are given by the kind of layer,")?;
    }
    Ok(Rotary { forms, of_layer: kinds.sliding.iter().map(|&slides| Some(usize::from(slides))).collect() })
}

fn form(rope: &Config, setting: &Setting) -> Result<RotaryForm> {
    let kind = rope.text("rope_type", rope.text("type", "default")?)?.to_string();
    rope.ignore(&["type", "finetuned"]);
    let share = rope.optional_number("partial_rotary_factor")?;
    let whole = setting.share.is_none() && share.is_some_and(|share| share != 1.0);
    let share = share.or(setting.share).unwrap_or(1.0);
    if !(0.0..=1.0).contains(&share) || whole {
        bail!(
            "{}: the rotated share of a head (partial_rotary_factor) is {share}, expected {}",
            rope.file,
            if whole { "1, as this family rotates whole heads" } else { "a number from 0 to 1" }
        );
    }
    let dimensions = (setting.head_dim as f64 * share) as usize;
    let plain = frequencies(setting.theta as f32, dimensions);
    let kind = match (kind.as_str(), setting.defaults.only_long) {
        ("su" | "yarn", true) => "longrope",
        ("linear" | "dynamic" | "llama3", true) => "",
        (kind, _) => kind,
    };
    let form = match kind {
        "default" => RotaryForm::fixed(plain),
        "linear" => {
            rope.ignore(&["original_max_position_embeddings"]);
            let factor = rope.needed_positive("factor")? as f32;
            RotaryForm::fixed(plain.into_iter().map(|frequency| frequency / factor).collect())
        }
        "dynamic" => {
            rope.ignore(&["original_max_position_embeddings"]);
            let factor = rope.needed_positive("factor")? as f32;
            if dimensions <= 2 {
                bail!("{}: dynamic scaling of {dimensions} rotated dimensions, expected more than 2", rope.file);
            }
            let (theta, original) = (setting.theta as f32, setting.longest);
            RotaryForm { frequencies: Frequencies::Dynamic { theta, dimensions, factor, original }, amplitude: 1.0 }
        }
        "llama3" => RotaryForm::fixed(llama3(rope, setting, plain)?),
        "yarn" => yarn(rope, setting, dimensions)?,
        "longrope" => long(rope, setting, plain)?,
        other => bail!(
            "{}: rope_type is \"{other}\"; known types are {}",
            rope.file,
            if setting.defaults.only_long {
                "default and longrope in this family"
            } else {
                "default, linear, dynamic, yarn, longrope and llama3"
            }
        ),
    };
    rope.check_all_read(&format!("rotary positions of rope_type {kind}"))?;
    Ok(form)
}

/// The longest sequence that a model was made for: `max_position_embeddings` (`longest`), or what scaling makes of it if
/// that is more.
///
/// Whether `max_position_embeddings` is that of the model before its scaling or after it differs between
/// models, so that the larger reading counts.
pub(super) fn context(config: &Config, longest: usize) -> usize {
    let described = ["rope_parameters", "rope_scaling"].into_iter().filter_map(|field| config.json.get(field));
    let kinds = described.flat_map(|rope| [Some(rope), rope.get("full_attention"), rope.get("sliding_attention")]);
    let scaled = kinds.flatten().filter_map(|rope| {
        let original = rope.get("original_max_position_embeddings").and_then(Value::as_f64);
        Some(original.unwrap_or(longest as f64) * rope.get("factor")?.as_f64()?)
    });
    scaled.fold(longest, |longest, scaled| longest.max(scaled as usize))
}

/// The length that the model was trained with before its context was extended.
fn original_length(rope: &Config, setting: &Setting) -> Result<usize> {
    let own = rope.optional_size("original_max_position_embeddings")?;
    Ok(setting.original_length.or(own).unwrap_or(setting.longest))
}

/// Llama 3.1's scaling: wavelengths beyond the original context are stretched by `factor`, short ones are kept, and those between are
/// interpolated.
fn llama3(rope: &Config, setting: &Setting, plain: Vec<f32>) -> Result<Vec<f32>> {
    let original = original_length(rope, setting)? as f32;
    let [factor, low, high] =
        ["factor", "low_freq_factor", "high_freq_factor"].map(|field| rope.needed_positive(field));
    let (factor, low, high) = (factor? as f32, low? as f32, high? as f32);
    let scaled = |frequency: f32| {
        let wavelength = 2.0 * std::f32::consts::PI / frequency;
        if wavelength > original / low {
            frequency / factor
        } else if wavelength < original / high {
            frequency
        } else {
            let smooth = (original / wavelength - low) / (high - low);
            (1.0 - smooth) * frequency / factor + smooth * frequency
        }
    };
    Ok(plain.into_iter().map(scaled).collect())
}

/// YaRN (Peng et al. 2023): pairs that turn more than `beta_fast` times within the original context keep their frequency, those that turn less than
/// `beta_slow` times are slowed down by `factor`, and those between are interpolated by their index. Cosines and sines are multiplied with
/// `attention_factor`, by default `0.1 ln(factor) + 1`.
fn yarn(rope: &Config, setting: &Setting, dimensions: usize) -> Result<RotaryForm> {
    let original = original_length(rope, setting)? as f64;
    let factor = rope.optional_positive("factor")?.unwrap_or(setting.longest as f64 / original);
    let [fast, slow] = [("beta_fast", 32.0), ("beta_slow", 1.0)].map(|(field, default)| -> Result<f64> {
        // Python's `or`: 0 is the default too.
        Ok(Some(rope.not_negative(field, default)?).filter(|beta| *beta > 0.0).unwrap_or(default))
    });
    let magnitude = |weight: f64| if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 };
    let [mscale, mscale_all] = ["mscale", "mscale_all_dim"].map(|field| rope.number(field, 0.0));
    let (mscale, mscale_all) = (mscale?, mscale_all?);
    let inferred =
        if mscale != 0.0 && mscale_all != 0.0 { magnitude(mscale) / magnitude(mscale_all) } else { magnitude(1.0) };
    let amplitude = rope.optional_number("attention_factor")?.unwrap_or(inferred);
    if !dimensions.is_multiple_of(2) || dimensions == 0 || setting.theta <= 1.0 {
        bail!(
            "{}: YaRN of {dimensions} rotated dimensions at rope_theta {}, expected an even number and a base above 1",
            rope.file,
            setting.theta
        );
    }
    let last = (dimensions - 1) as f64;
    // The index of the pair that turns this often within the original context.
    let index = |turns: f64| dimensions as f64 * (original / (turns * 2.0 * PI)).ln() / (2.0 * setting.theta.ln());
    let (mut low, mut high) = (index(fast?), index(slow?));
    if setting.truncates.unwrap_or(true) {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, mut high) = (low.max(0.0), high.min(last));
    if low == high {
        high += 0.001;
    }
    let blended = |(index, frequency): (usize, f32)| {
        let slowed = ((index as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
        frequency / factor as f32 * slowed + frequency * (1.0 - slowed)
    };
    let plain = frequencies(setting.theta as f32, dimensions);
    let scaled = plain.into_iter().enumerate().map(blended).collect();
    Ok(RotaryForm { frequencies: Frequencies::Fixed(scaled), amplitude: amplitude as f32 })
}

/// LongRoPE: each frequency is divided by a factor of its own, from one list up to the original length and from another beyond it. Cosines and sines are
/// multiplied with `attention_factor`, by default `sqrt(1 + ln(factor) / ln(original))`.
fn long(rope: &Config, setting: &Setting, plain: Vec<f32>) -> Result<RotaryForm> {
    let original = original_length(rope, setting)?;
    let [short, long] = ["short_factor", "long_factor"].map(|field| rope.positive_list(field, plain.len()));
    let divided = |factors: Vec<f32>| plain.iter().zip(factors).map(|(plain, factor)| plain / factor).collect();
    let factor = rope.optional_positive("factor")?.unwrap_or(setting.longest as f64 / original as f64);
    let inferred = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / (original as f64).ln()).sqrt() };
    // The multiplication that the first Phi-3 had for the two lengths; transformers does not read it.
    rope.ignore(&["long_mscale", "short_mscale"]);
    let amplitude = rope.optional_number("attention_factor")?.unwrap_or(inferred) as f32;
    let frequencies = Frequencies::Long { short: divided(short?), long: divided(long?), original };
    Ok(RotaryForm { frequencies, amplitude })
}
