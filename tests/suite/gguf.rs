//! GGUF files against what llama.cpp's Python package, `transformers` and SentencePiece make of them; see `tests/golden/gguf_files.py`.

use std::path::{Path, PathBuf};

use candle_core::Device;
use rand::{Rng, SeedableRng};
use rlhf::Result;
use rlhf::adapt::Head;
use rlhf::data::batch::{Batch, Continuation, TokenTree};
use rlhf::data::tokenize::Tokenizer;
use rlhf::gguf::Gguf;
use rlhf::ops::{CompactBuilder, CompactForm};

use crate::oracle::{Tensors, assert_close, documents, floats, load, logits};

const FAMILIES: [&str; 13] = [
    "llama",
    "llama3",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "phi3-long",
    "olmo2",
    "granite",
    "smollm3",
    "gpt2",
    "gptneox",
];

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/gguf").join(name)
}

fn tensors(name: &str) -> Result<Tensors> {
    Ok(candle_core::safetensors::load(file(name), &Device::Cpu)?.into_iter().collect())
}

/// The tokens of a text, without what is put before every text.
fn ids(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    let mut ids = tokenizer.encode(text)?;
    if tokenizer.encode("")?.first() == ids.first() {
        ids.remove(0);
    }
    Ok(ids)
}

#[test]
fn every_block_type_is_dequantised_as_ggml_does() -> Result<()> {
    let gguf = Gguf::open(&file("blocks.gguf"))?;
    let expected = tensors("blocks.safetensors")?;
    assert_eq!(gguf.tensors.len(), expected.len());
    for (name, info) in &gguf.tensors {
        let found = gguf.numbers(name, info)?;
        assert_close(name, &found, &floats(&expected, name)?, 1e-6);
    }
    Ok(())
}

#[test]
fn every_block_type_that_is_kept_as_it_is_is_widened_as_ggml_does() -> Result<()> {
    let gguf = Gguf::open(&file("blocks.gguf"))?;
    let (bytes, expected) = (std::fs::read(file("blocks.gguf")).unwrap(), tensors("blocks.safetensors")?);
    let mut kept = 0;
    for (name, info) in &gguf.tensors {
        let Some(form) = CompactForm::of_ggml(info.dtype) else { continue };
        let (columns, rows) = (*info.shape.last().unwrap(), info.shape[..info.shape.len() - 1].iter().product());
        let mut matrix = CompactBuilder::new(form, rows, columns)?;
        matrix.push_bytes(&bytes[info.start as usize..][..info.bytes]);
        let found: Vec<f32> = matrix.build()?.to_tensor().flatten_all()?.to_vec1()?;
        assert_close(name, &found, &floats(&expected, name)?, 1e-6);
        kept += 1;
    }
    assert!(kept >= 10, "{kept} types of blocks");
    Ok(())
}

#[test]
fn models_have_the_logits_of_transformers() -> Result<()> {
    for name in FAMILIES {
        let expected = tensors(&format!("{name}.safetensors"))?;
        let model = load(&file(&format!("{name}.gguf")), None, Head::Language)?;
        let found = logits(&model, &Batch::pack(&documents(&expected)?))?;
        assert_close(name, &found, &floats(&expected, "logits")?, 1e-4);
    }
    Ok(())
}

/// What is written is a folder that holds the same model.
#[test]
fn a_saved_model_is_a_folder_with_the_same_logits_and_tokens() -> Result<()> {
    for name in FAMILIES {
        let expected = tensors(&format!("{name}.safetensors"))?;
        let path = file(&format!("{name}.gguf"));
        let model = load(&path, None, Head::Language)?;
        let folder = tempfile::tempdir().expect("a temporary folder");
        model.save(folder.path())?;
        let again = load(folder.path(), None, Head::Language)?;
        let batch = Batch::pack(&documents(&expected)?);
        assert_eq!(logits(&again, &batch)?, logits(&model, &batch)?, "{name}");
        let (before, after) = (Tokenizer::load(&path)?, Tokenizer::load(folder.path())?);
        assert_eq!(ids(&before, "AB !<|pad|>X")?, ids(&after, "AB !<|pad|>X")?);
        assert_eq!(before.stop_tokens(), after.stop_tokens());
        assert_eq!(before.stop_tokens(), [2]);
    }
    Ok(())
}

#[test]
fn a_sentencepiece_vocabulary_gives_the_ids_of_sentencepiece() -> Result<()> {
    let tokenizer = Tokenizer::load(file("sentencepiece.gguf"))?;
    let cases: Vec<(String, Vec<u32>)> =
        serde_json::from_slice(&std::fs::read(file("sentencepiece.json")).expect("a golden file")).expect("pairs");
    for (text, expected) in cases {
        assert_eq!(ids(&tokenizer, &text)?, expected, "{text:?}");
    }
    Ok(())
}

/// A line of words, numbers, punctuation, white space and letters of many scripts.
fn mixed_line(seed: u64) -> String {
    let scripts = [
        ' '..='~',
        '\u{a0}'..='\u{24f}',
        'Ѐ'..='ӿ',
        '\u{5d0}'..='\u{6ff}',
        '\u{900}'..='\u{97f}',
        '\u{e01}'..='\u{e5b}',
        '\u{2000}'..='\u{206f}',
        '\u{3040}'..='\u{30ff}',
        '一'..='龥',
        '가'..='힣',
        '\u{1f300}'..='\u{1f6ff}',
        '\u{300}'..='\u{36f}',
    ];
    let words = [
        " the",
        " don't",
        "I'LL",
        "  ",
        "\t",
        "\r\n",
        "1984",
        " 3.14",
        "...",
        "<|im_end|>",
        "<|im_start|>user\n",
        "é",
        "ﬁ",
        " ½",
    ];
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let mut line = String::new();
    for _ in 0..random.random_range(1..40) {
        match random.random_range(0..3) {
            0 => line.push_str(words[random.random_range(0..words.len())]),
            1 => line.push(random.random_range(' '..='~')),
            _ => {
                let script = scripts[random.random_range(0..scripts.len())].clone();
                line.push(random.random_range(script));
            }
        }
    }
    line
}

/// SmolLM2-135M-Instruct as llama.cpp's users have it, where `RLHF_SMOLLM2` names its GGUF file, and the folder that transformers makes of it, in
/// `RLHF_SMOLLM2_FOLDER` (f32).
#[test]
fn a_real_model_has_the_logits_and_tokens_of_its_folder() -> Result<()> {
    let (Some(gguf), Some(folder)) = (std::env::var_os("RLHF_SMOLLM2"), std::env::var_os("RLHF_SMOLLM2_FOLDER")) else {
        eprintln!("skipped: RLHF_SMOLLM2 and RLHF_SMOLLM2_FOLDER name no model");
        return Ok(());
    };
    let (gguf, folder) = (Path::new(&gguf), Path::new(&folder));
    let (of_gguf, of_folder) = (Tokenizer::load(gguf)?, Tokenizer::load(folder)?);
    let texts = [
        "The capital of France is",
        "  def f(x):\n\treturn x**2 # 1984",
        "naïve Zürich — “quoted” Москва 日本語 😀 e\u{301}",
    ];
    for text in texts.into_iter().map(String::from).chain((0..1000).map(mixed_line)) {
        assert_eq!(ids(&of_gguf, &text)?, ids(&of_folder, &text)?, "{text:?}");
    }
    assert_eq!(of_gguf.stop_tokens(), of_folder.stop_tokens());
    let document = |text: &&str| -> Result<TokenTree> {
        let tokens = ids(&of_folder, text)?;
        let learned = vec![true; tokens.len()];
        Ok(TokenTree { prompt: Vec::new(), answers: vec![Continuation { tokens, learned }] })
    };
    let batch = Batch::pack(&texts.iter().map(document).collect::<Result<Vec<_>>>()?);
    let (of_gguf, of_folder) = (load(gguf, None, Head::Language)?, load(folder, None, Head::Language)?);
    assert_close("SmolLM2", &logits(&of_gguf, &batch)?, &logits(&of_folder, &batch)?, 1e-4);
    Ok(())
}

/// A copy of a golden file in which `from` is replaced by the text `to` of the same length.
fn changed(name: &str, from: &str, to: &str) -> tempfile::TempPath {
    assert_eq!(from.len(), to.len());
    let mut bytes = std::fs::read(file(name)).expect("a golden file");
    let places = bytes.windows(from.len()).enumerate().filter(|(_, window)| *window == from.as_bytes());
    let places: Vec<usize> = places.map(|(place, _)| place).collect();
    assert!(!places.is_empty(), "{from} is in {name}");
    places.into_iter().for_each(|place| bytes[place..place + to.len()].copy_from_slice(to.as_bytes()));
    let copy = tempfile::Builder::new().suffix(".gguf").tempfile().expect("a temporary file").into_temp_path();
    std::fs::write(&copy, bytes).expect("a temporary file");
    copy
}

#[test]
fn the_token_that_ends_a_turn_is_known_by_its_text() -> Result<()> {
    assert_eq!(Tokenizer::load(file("llama.gguf"))?.stop_tokens(), [2]);
    let turns = changed("llama.gguf", "<|pad|>", "<|end|>");
    assert_eq!(Tokenizer::load(&turns)?.stop_tokens(), [2, 0]);
    Ok(())
}

#[test]
fn what_is_no_model_and_settings_that_are_not_known_are_refused_by_name() {
    let other = changed("llama.gguf", "llama.rope.freq_base", "llama.rope.freq_none");
    let error = load(&other, None, Head::Language).err().expect("an unknown field").to_string();
    assert!(error.contains("llama.rope.freq_none") && error.contains("not known"), "{error}");
}
