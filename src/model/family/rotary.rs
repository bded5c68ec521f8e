//! The frequencies of rotary positions, as `config.json` describes them.

use serde_json::Value;

use crate::bail;
use crate::error::Result;
use crate::model::architecture::Config;

/// `1 / theta^(2 i / dimensions)`, with Llama 3's scaling where the configuration asks for it.
///
/// The base stands at the top level (GPT-NeoX calls it `rotary_emb_base`) with `rope_scaling` beside it, or, in files of current `transformers`, both in
/// `rope_parameters`. Arithmetic is in f32 as in `transformers`, so that angles agree at large positions too.
pub(super) fn rotary_frequencies(config: &Config, dimensions: usize) -> Result<Vec<f32>> {
    let file = format!("{} (rotary positions)", config.file);
    let empty = Value::Object(Default::default());
    let scaling = config.get("rope_parameters").or_else(|| config.get("rope_scaling")).unwrap_or(&empty);
    let scaling = Config { json: scaling, file: &file };
    let theta = scaling
        .positive("rope_theta", config.positive("rope_theta", config.positive("rotary_emb_base", 10_000.0)?)?)?;
    let frequencies: Vec<f32> =
        (0..dimensions / 2).map(|index| 1.0 / (theta as f32).powf((2 * index) as f32 / dimensions as f32)).collect();
    match scaling.text("rope_type", scaling.text("type", "default")?)? {
        "default" => Ok(frequencies),
        "linear" => {
            let factor = scaling.positive("factor", 1.0)? as f32;
            Ok(frequencies.into_iter().map(|frequency| frequency / factor).collect())
        }
        "llama3" => {
            let original = scaling.size("original_max_position_embeddings")? as f32;
            let factor = scaling.positive("factor", 8.0)? as f32;
            let low_factor = scaling.positive("low_freq_factor", 1.0)? as f32;
            let high_factor = scaling.positive("high_freq_factor", 4.0)? as f32;
            let scale = |frequency: f32| llama3_frequency(frequency, original, factor, low_factor, high_factor);
            Ok(frequencies.into_iter().map(scale).collect())
        }
        other => bail!("{file}: rope_type is \"{other}\"; known types are default, linear and llama3"),
    }
}

/// The longest sequence that a model was made for: `max_position_embeddings`, or what scaling makes of it if
/// that is more.
///
/// Whether `max_position_embeddings` is that of the model before its scaling or after it differs between
/// models, so that the larger reading counts.
pub(super) fn context(config: &Config, default: usize) -> Result<usize> {
    let positions = config.optional_size("max_position_embeddings")?.unwrap_or(default);
    let scaled = ["rope_parameters", "rope_scaling"].into_iter().filter_map(|field| {
        let scaling = config.get(field)?;
        let original = scaling.get("original_max_position_embeddings").and_then(Value::as_f64);
        Some(original.unwrap_or(positions as f64) * scaling.get("factor")?.as_f64()?)
    });
    Ok(scaled.fold(positions, |longest, scaled| longest.max(scaled as usize)))
}

/// Llama 3.1's scaling: wavelengths beyond the original context are stretched by `factor`, short ones are kept, and those
/// between are interpolated.
fn llama3_frequency(frequency: f32, original: f32, factor: f32, low_factor: f32, high_factor: f32) -> f32 {
    let wavelength = 2.0 * std::f32::consts::PI / frequency;
    if wavelength > original / low_factor {
        frequency / factor
    } else if wavelength < original / high_factor {
        frequency
    } else {
        let smooth = (original / wavelength - low_factor) / (high_factor - low_factor);
        (1.0 - smooth) * frequency / factor + smooth * frequency
    }
}
