//! What holds of every lightweight method: a new one changes nothing, stacks add up, and a batch may mix them.

use candle_core::{Device, Tensor};
use rlhf::Result;
use rlhf::adapt::{Bases, Head, Role, Training};
use rlhf::data::batch::{Batch, Continuation, TokenTree};
use rlhf::generate::{PromptTokens, SamplingSettings};
use rlhf::model::Model;
use rlhf::model::adapter::{Parameter, Pass, StepRows};
use rlhf::ops::{Outputs, Weight};
use rlhf::random;
use rlhf::train::memory::{Footprint, PassFootprint};

use crate::common::{Shape, answers_to, assert_same_answers, training_settings, write_model};
use crate::oracle::assert_close;

/// Arguments of every method, and of some that stand on top of each other.
const METHODS: [&str; 27] = [
    "lora",
    "lora --target-modules all-linear,embed_tokens,wte,embed_in --lora-r 4 --use-rslora",
    "lora --use-dora",
    "lora --init-lora-weights pissa",
    "lora --init-lora-weights orthogonal",
    "lora --lora-bias all --modules-to-save lm_head,embed_tokens,wte,embed_in",
    "lora --target-modules q_proj,c_attn,query_key_value,qkv_proj,lm_head",
    "lora --target-modules all-linear,lm_head --use-dora",
    "lora --target-modules q_proj,c_attn,query_key_value,qkv_proj --modules-to-save norm,ln_f,down_proj,mlp.c_fc,dense_4h_to_h",
    "bitfit",
    "bitfit --bitfit-biases query,feed-forward-up",
    "ia3",
    "ia3 --modules-to-save lm_head,embed_tokens,wte,embed_in",
    "ia3 --target-modules q_proj,c_attn,query_key_value,qkv_proj,lm_head --feedforward-modules down_proj,mlp.c_proj,dense_4h_to_h",
    // The last linear of a block has its output scaled.
    "ia3 --target-modules down_proj,mlp.c_proj,dense_4h_to_h \
        --feedforward-modules q_proj,c_attn,query_key_value,qkv_proj",
    "prompt-tuning",
    "p-tuning",
    "p-tuning --encoder-reparameterization-type lstm",
    "prefix-tuning",
    "prefix-tuning --prefix-projection",
    "p-tuning-v2",
    "adapters",
    "adapters --adapter-placement pfeiffer --adapter-train-norms",
    "adapters --adapter-placement parallel",
    "probing --probe-layer 1",
    "lora+prompt-tuning",
    "ia3+prefix-tuning",
];

/// The arguments with those layer names alone that a shape has.
fn arguments(method: &str, shape: Shape) -> Vec<String> {
    let absent: &[&str] = match shape {
        Shape::Gpt2 => {
            &["embed_tokens", "embed_in", "q_proj", "query_key_value", "qkv_proj", "norm", "down_proj", "dense_4h_to_h"]
        }
        Shape::GptNeox => {
            &["embed_tokens", "wte", "q_proj", "c_attn", "qkv_proj", "ln_f", "mlp.c_fc", "down_proj", "mlp.c_proj"]
        }
        Shape::Phi3 => &[
            "wte",
            "embed_in",
            "c_attn",
            "query_key_value",
            "ln_f",
            "mlp.c_fc",
            "dense_4h_to_h",
            "mlp.c_proj",
            "q_proj",
        ],
        _ => &[
            "wte",
            "embed_in",
            "c_attn",
            "query_key_value",
            "ln_f",
            "mlp.c_fc",
            "dense_4h_to_h",
            "mlp.c_proj",
            "qkv_proj",
        ],
    };
    let word = |word: &str| word.split(',').filter(|name| !absent.contains(name)).collect::<Vec<_>>().join(",");
    let tokens = if method.contains("--num-virtual-tokens") { "" } else { " --num-virtual-tokens 5" };
    format!("--method {method}{tokens}").split(' ').map(word).collect()
}

/// The same base model bare and with each method; their adapters are as new, or filled with random numbers.
fn models(shape: Shape, methods: &[&str], as_new: bool) -> Result<(Model, Vec<Model>)> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    write_model(shape, folder.path())?;
    let mut bases = Bases::new(Device::Cpu);
    let role = Role { folder: folder.path(), adapters: &[], training: Training::Frozen, head: Head::Language, seed: 7 };
    let base = bases.load(&role)?;
    let with = |(index, method): (usize, &&str)| -> Result<Model> {
        let arguments = arguments(method, shape);
        let settings = training_settings(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        let model = bases.load(&Role { training: Training::With(&settings), seed: 7 + index as u64, ..role })?;
        for parameter in model.trainable_parameters() {
            if !as_new {
                let mut stream = random::stream(index as u64, &parameter.name, 0);
                let values = random::normal(&mut stream, parameter.variable.dims(), 0.3, &Device::Cpu)?;
                parameter.variable.set(&(parameter.variable.as_tensor() + values)?)?;
            }
        }
        Ok(model)
    };
    let models = methods.iter().enumerate().map(with).collect::<Result<_>>()?;
    Ok((base, models))
}

fn trees(count: u64) -> Vec<TokenTree> {
    use rand::Rng;
    let tree = |seed: u64| {
        let mut stream = random::stream(seed, "tokens", 0);
        let mut tokens = |len: usize| (0..len).map(|_| stream.random_range(0..64u32)).collect::<Vec<u32>>();
        let prompt = tokens(3 + seed as usize % 4);
        let answer = |tokens: Vec<u32>| Continuation { learned: vec![true; tokens.len()], tokens };
        TokenTree { prompt, answers: vec![answer(tokens(5)), answer(tokens(2))] }
    };
    (0..count).map(tree).collect()
}

fn log_probs(model: &Model, batch: &Batch) -> Result<Vec<f32>> {
    let hidden = model.hidden(batch, &Pass::default())?;
    model.log_probs(&hidden, batch, 1.0)?.log_probs.to_vec1()
}

fn logits(model: &Model, batch: &Batch) -> Result<Vec<f32>> {
    crate::oracle::logits(model, batch)
}

const SHAPES: [Shape; 9] = [
    Shape::Llama,
    Shape::Gpt2,
    Shape::GptNeox,
    Shape::Gemma2,
    Shape::Gemma3,
    Shape::Smollm3,
    Shape::Olmo3,
    Shape::Phi3,
    Shape::Granite,
];

#[test]
fn a_new_adapter_changes_no_logit() -> Result<()> {
    // Virtual tokens and prefixes are something to attend to as soon as they are there.
    let neutral: Vec<&str> =
        METHODS.into_iter().filter(|method| !method.contains("-tuning") && *method != "p-tuning-v2").collect();
    let neutral: Vec<&str> =
        neutral.into_iter().filter(|method| !method.starts_with("probing")).chain(["probing"]).collect();
    for shape in SHAPES {
        let batch = Batch::pack(&trees(3));
        let (base, models) = models(shape, &neutral, true)?;
        let expected = logits(&base, &batch)?;
        for (method, model) in neutral.iter().zip(&models) {
            assert_close(&format!("{shape:?}, {method}"), &logits(model, &batch)?, &expected, 2e-6);
        }
    }
    Ok(())
}

#[test]
fn every_parameter_of_every_method_matters_and_has_a_gradient() -> Result<()> {
    for shape in SHAPES {
        let batch = Batch::pack(&trees(3));
        let (base, models) = models(shape, &METHODS, false)?;
        let bare = log_probs(&base, &batch)?;
        for (method, model) in METHODS.iter().zip(&models) {
            let changed = log_probs(model, &batch)?;
            assert!(
                changed.iter().zip(&bare).any(|(a, b)| (a - b).abs() > 1e-3),
                "{shape:?}, {method}: changes nothing"
            );
            let hidden = model.hidden(&batch, &Pass::default())?;
            let mut outputs = Outputs::default();
            let loss = outputs.tensor(&model.log_probs(&hidden, &batch, 1.0)?.log_probs)?.sum_all()?;
            let gradients = outputs.gradients(&loss)?;
            for parameter in model.trainable_parameters() {
                let gradient = gradients.get(&parameter.variable);
                // Every key of a softmax is shifted alike by a key's bias, which therefore changes nothing.
                let is_key_bias = parameter.name.ends_with("k_proj.bias");
                let gradient = gradient.unwrap_or_else(|| panic!("{shape:?}, {method}: {}", parameter.name));
                let largest: f32 = gradient.to_tensor()?.abs()?.flatten_all()?.max(0)?.to_scalar()?;
                assert!(largest > 0.0 || is_key_bias, "{shape:?}, {method}: no gradient at {}", parameter.name);
            }
        }
    }
    Ok(())
}

/// Log-probabilities and the gradient of every parameter, with dropout where the method has it.
fn log_probs_and_gradients(model: &Model, batch: &Batch) -> Result<(Vec<f32>, Vec<Vec<f32>>)> {
    let pass = Pass { dropout: Some(StepRows { seed: 3, first_row: 0 }) };
    let hidden = model.hidden(batch, &pass)?;
    let mut outputs = Outputs::default();
    let log_probs = outputs.tensor(&model.log_probs(&hidden, batch, 1.0)?.log_probs)?;
    let gradients = outputs.gradients(&log_probs.sqr()?.sum_all()?)?;
    let of = |parameter: &Parameter| -> Result<Vec<f32>> {
        let gradient =
            gradients.get(&parameter.variable).unwrap_or_else(|| panic!("no gradient of {}", parameter.name));
        Ok(gradient.to_tensor()?.flatten_all()?.to_vec1()?)
    };
    Ok((log_probs.to_vec1()?, model.trainable_parameters().iter().map(of).collect::<Result<_>>()?))
}

#[test]
fn blocks_that_are_run_again_in_the_backward_pass_give_equal_bits() -> Result<()> {
    let batch = Batch::pack(&trees(3));
    let methods = [&METHODS[..], &["full", "lora --lora-dropout 0.3", "lora --use-dora --lora-dropout 0.3"]].concat();
    for shape in SHAPES {
        let (_, models) = models(shape, &methods, false)?;
        for (method, model) in methods.iter().zip(models) {
            let kept = log_probs_and_gradients(&model, &batch)?;
            let again = log_probs_and_gradients(&model.with_checkpoints(true), &batch)?;
            assert!(kept == again, "{shape:?}, {method}");
        }
    }
    Ok(())
}

#[test]
fn what_a_pass_keeps_is_counted_by_the_row_and_beside_its_rows() -> Result<()> {
    let of = |method: &str| -> Result<(Model, PassFootprint)> {
        let (_, mut models) = models(Shape::Llama, &[method], true)?;
        let model = models.remove(0);
        let pass = Footprint::of("model", &model)?.pass;
        Ok((model, pass))
    };
    // A prefix is keys and values, whatever rows there are.
    let (_, few) = of("prefix-tuning --num-virtual-tokens 5")?;
    let (_, many) = of("prefix-tuning --num-virtual-tokens 10")?;
    assert_eq!((few.kept, 2 * few.fixed), (many.kept, many.fixed));
    assert!(few.fixed > 0);
    // Virtual tokens are rows of the pass, before every sequence.
    let (model, few) = of("prompt-tuning --num-virtual-tokens 5")?;
    let (_, many) = of("prompt-tuning --num-virtual-tokens 10")?;
    assert_eq!(few.kept, many.kept);
    let mut trees = trees(5);
    trees[3].prompt.clear();
    let rows: usize = trees.iter().map(|tree| model.rows_of(tree)).sum();
    assert_eq!(rows, model.rows(&model.pack(&trees)));
    let roots = trees.iter().map(|tree| if tree.prompt.is_empty() { tree.answers.len() } else { 1 });
    assert_eq!(rows, trees.iter().map(TokenTree::tokens).sum::<usize>() + 5 * roots.sum::<usize>());
    Ok(())
}

#[test]
fn a_batch_of_all_methods_gives_each_row_what_it_gives_alone() -> Result<()> {
    for shape in SHAPES {
        let (base, models) = models(shape, &METHODS, false)?;
        let frozen = models.iter().map(Model::frozen).collect::<Result<Vec<_>>>()?;
        let mixed = base.clone().with_stacks_of(&models)?.frozen()?;
        let trees = trees(2 * METHODS.len() as u64 + 2);
        let stack = |index: usize| index * 5 % (METHODS.len() + 1);
        let together = Batch::pack_stacks(trees.iter().enumerate().map(|(index, tree)| (tree, stack(index))));
        let found = log_probs(&mixed, &together)?;
        for (index, tree) in trees.iter().enumerate() {
            let model = stack(index).checked_sub(1).map_or(&base, |index| &frozen[index]);
            let expected = log_probs(model, &Batch::pack([tree]))?;
            let answers = together.trees[index].clone();
            let range = together.answer_targets[answers.start].start..together.answer_targets[answers.end - 1].end;
            assert_close(&format!("{shape:?}, row {index}"), &found[range], &expected, 1e-5);
        }
    }
    Ok(())
}

#[test]
fn sampling_with_all_methods_in_one_batch_gives_what_each_gives_alone() -> Result<()> {
    let settings = SamplingSettings { temperature: 1.0, response_length: 6, ..Default::default() };
    for shape in SHAPES {
        let (base, models) = models(shape, &METHODS, false)?;
        let mixed = base.clone().with_stacks_of(&models)?;
        let stack = |index: usize| index * 5 % (METHODS.len() + 1);
        // Prompts of every other stack begin alike.
        let beginning = |stack: usize| if stack.is_multiple_of(2) { vec![7; 36] } else { Vec::new() };
        let prompts: Vec<PromptTokens> = (trees(40).into_iter().enumerate())
            .map(|(index, tree)| (stack(index), tree.prompt))
            .map(|(stack, tokens)| PromptTokens { tokens: [beginning(stack), tokens].concat(), stack, origin: None })
            .collect();
        let generated = answers_to(&mixed, &prompts, settings, &[3], 5, 0)?;
        assert_eq!(generated.shared_tokens == 0, shape == Shape::Phi3, "{shape:?}");
        let together = generated.answers;
        for (index, prompt) in prompts.iter().enumerate() {
            let model = prompt.stack.checked_sub(1).map_or(&base, |index| &models[index]);
            let alone = [PromptTokens::from(prompt.tokens.clone())];
            let alone = answers_to(model, &alone, settings, &[3], 5, 2 * index as u64)?.answers;
            let what = format!("{shape:?}, prompt {index} with stack {}", prompt.stack);
            assert_same_answers(&together[index], &alone[0], &what);
        }
    }
    Ok(())
}

#[test]
fn adapters_that_are_asked_once_change_what_they_change_when_asked_each_time() -> Result<()> {
    for shape in [Shape::Llama, Shape::Gpt2, Shape::GptNeox] {
        let (_, models) = models(shape, &METHODS, false)?;
        for (model, method) in models.iter().zip(METHODS) {
            let batch = Batch::pack(&trees(3));
            let expected = log_probs(&model.frozen()?, &batch)?;
            let resolved = model.frozen()?.resolved();
            for pass in 0..2 {
                assert_eq!(log_probs(&resolved, &batch)?, expected, "{shape:?}, {method}, pass {pass}");
            }
        }
    }
    Ok(())
}

#[test]
fn adapters_on_one_linear_fold_into_what_they_compute_in_either_order() -> Result<()> {
    let stacks =
        ["lora+ia3", "ia3+lora", "ia3+lora --use-dora", "lora+ia3 --use-dora", "bitfit+ia3", "ia3+bitfit+lora"];
    let with_output = "ia3+lora --target-modules q_proj,c_attn,query_key_value,qkv_proj,lm_head";
    let stacks: Vec<&str> = stacks.into_iter().chain([with_output]).collect();
    for shape in [Shape::Llama, Shape::Gpt2, Shape::GptNeox, Shape::Phi3] {
        let batch = Batch::pack(&trees(3));
        // Of the families without biases none has a place for those of BitFit.
        let has_biases = matches!(shape, Shape::Gpt2 | Shape::GptNeox);
        let stacks: Vec<&str> =
            stacks.iter().copied().filter(|stack| has_biases || !stack.contains("bitfit")).collect();
        let (_, models) = models(shape, &stacks, false)?;
        for (stack, model) in stacks.iter().zip(&models) {
            let folded = rlhf::adapt::merged(model)?;
            assert!(folded.adapters().is_empty());
            assert_close(&format!("{shape:?}, {stack}"), &logits(&folded, &batch)?, &logits(model, &batch)?, 1e-5);
        }
    }
    Ok(())
}

#[test]
fn with_all_base_weights_zero_virtual_tokens_and_prefixes_change_nothing() -> Result<()> {
    let batch = Batch::pack(&trees(2));
    let (base, _) = models(Shape::Llama, &[], true)?;
    let mut weights = (**base.weights()).clone();
    let names: Vec<String> = weights.iter().map(|(name, _)| name.clone()).collect();
    for name in names {
        let zero = weights.get(&name)?.zeros_like()?;
        weights.set(&name, zero);
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    base.with_weights(weights)?.save(folder.path())?;
    let load = |arguments: &[&str]| {
        let settings = training_settings(arguments);
        let training = if arguments.is_empty() { Training::Frozen } else { Training::With(&settings) };
        Bases::new(Device::Cpu).load(&Role {
            folder: folder.path(),
            adapters: &[],
            training,
            head: Head::Language,
            seed: 1,
        })
    };
    let expected = logits(&load(&[])?, &batch)?;
    for method in ["prompt-tuning", "p-tuning", "prefix-tuning", "p-tuning-v2"] {
        let model = load(&["--method", method, "--prompt-tuning-init", "random"])?;
        for parameter in model.trainable_parameters() {
            let noise =
                random::normal(&mut random::stream(1, method, 0), parameter.variable.dims(), 1.0, &Device::Cpu)?;
            parameter.variable.set(&noise)?;
        }
        assert_eq!(logits(&model, &batch)?, expected, "{method}");
    }
    Ok(())
}

#[test]
fn pissa_starts_from_the_weights_it_is_given_and_is_saved_as_plain_lora() -> Result<()> {
    let batch = Batch::pack(&trees(2));
    for method in
        ["lora --init-lora-weights pissa --lora-r 4", "lora --init-lora-weights pissa --lora-r 4 --use-rslora"]
    {
        let (_, models) = models(Shape::Llama, &[method], false)?;
        let copy = tempfile::tempdir().expect("a temporary folder");
        models[0].save(copy.path())?;
        let text = std::fs::read_to_string(copy.path().join("adapter_config.json")).expect("a configuration");
        assert!(text.contains("\"r\": 8"), "{text}");
        // The temporary base is gone; the same one is made again from its seed.
        let folder = tempfile::tempdir().expect("a temporary folder");
        write_model(Shape::Llama, folder.path())?;
        let adapters = [copy.path().to_path_buf()];
        let role = Role {
            folder: folder.path(),
            adapters: &adapters,
            training: Training::Frozen,
            head: Head::Language,
            seed: 7,
        };
        let again = Bases::new(Device::Cpu).load(&role)?;
        assert_close(method, &logits(&again, &batch)?, &logits(&models[0], &batch)?, 1e-5);
    }
    Ok(())
}

#[test]
fn pissas_product_is_the_best_of_its_rank() -> Result<()> {
    let golden = crate::oracle::expected("initialisation")?;
    let weight: &Tensor = &golden["weight"];
    let (down, up) =
        rlhf::adapt::initial_update(rlhf::settings::LoraInit::Pissa, &Weight::new(weight, None), "w", 4, 2.0, 1)?;
    let product = up.matmul(&down)?.affine(2.0, 0.0)?;
    let values = |x: &Tensor| -> Result<Vec<f32>> { Ok(x.flatten_all()?.to_vec1()?) };
    assert_close("product", &values(&product)?, &values(&golden["pissa.product"])?, 1e-4);
    assert_close("rest", &values(&(weight - product)?)?, &values(&golden["pissa.residual"])?, 1e-4);
    Ok(())
}
