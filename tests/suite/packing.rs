//! A packed batch gives, sequence by sequence, what each sequence gives alone; answers that share a prompt's segment give what
//! separate sequences give.

use crate::common::{Shape, answers_to, assert_same_answers, tiny_model};
use rlhf::Result;
use rlhf::data::batch::{Batch, Continuation, TokenTree};
use rlhf::generate::{PromptTokens, SamplingSettings};
use rlhf::model::Model;
use rlhf::model::adapter::{Parameter, Pass};
use rlhf::ops::Outputs;
use rlhf::random;

use rand::Rng;

const SHAPES: [Shape; 11] = [
    Shape::Llama,
    Shape::Mistral,
    Shape::Gpt2,
    Shape::Qwen3,
    Shape::GptNeox,
    Shape::Gemma2,
    Shape::Gemma3,
    Shape::Smollm3,
    Shape::Olmo3,
    Shape::Phi3,
    Shape::Granite,
];

fn tree(seed: u64, prompt: usize, answers: &[usize]) -> TokenTree {
    let mut stream = random::stream(seed, "test tokens", 0);
    let mut tokens = |count: usize| (0..count).map(|_| stream.random_range(0..64u32)).collect::<Vec<u32>>();
    let prompt = tokens(prompt);
    let answers = answers.iter().map(|&len| Continuation { tokens: tokens(len), learned: vec![true; len] }).collect();
    TokenTree { prompt, answers }
}

/// Each answer with a copy of the prompt.
fn separated(tree: &TokenTree) -> Vec<TokenTree> {
    let alone = |answer: &Continuation| TokenTree { prompt: tree.prompt.clone(), answers: vec![answer.clone()] };
    tree.answers.iter().map(alone).collect()
}

fn log_probs(model: &Model, trees: &[TokenTree]) -> Result<Vec<f32>> {
    let batch = model.pack(trees);
    let hidden = model.hidden(&batch, &Pass::default())?;
    model.log_probs(&hidden, &batch, 1.0)?.log_probs.to_vec1()
}

/// The gradient of every parameter, by name.
type Gradients = Vec<(String, Vec<f32>)>;

/// Sum of the squared log-probabilities of all targets, and its gradient.
fn loss_and_gradients(model: &Model, trees: &[TokenTree]) -> Result<(f32, Gradients)> {
    let batch = model.pack(trees);
    let hidden = model.hidden(&batch, &Pass::default())?;
    let mut outputs = Outputs::default();
    let log_probs = outputs.tensor(&model.log_probs(&hidden, &batch, 1.0)?.log_probs)?;
    let loss = log_probs.sqr()?.sum_all()?;
    let gradients = outputs.gradients(&loss)?;
    let mut all = Vec::new();
    for Parameter { name, variable, .. } in model.trainable_parameters() {
        let gradient = gradients.get(&variable).unwrap_or_else(|| panic!("{name} has a gradient"));
        all.push((name, gradient.to_tensor()?.flatten_all()?.to_vec1()?));
    }
    Ok((loss.to_scalar()?, all))
}

fn close(found: f32, expected: f32, scale: f32) -> bool {
    (found - expected).abs() <= 1e-5 * scale.max(1.0)
}

#[test]
fn a_packed_batch_equals_its_sequences_alone() -> Result<()> {
    for shape in SHAPES {
        let model = tiny_model(shape, false)?;
        let trees = [tree(1, 5, &[4]), tree(2, 0, &[9]), tree(3, 17, &[1, 6]), tree(4, 1, &[2])];
        let packed = log_probs(&model, &trees)?;
        let mut alone = Vec::new();
        for tree in &trees {
            alone.extend(log_probs(&model, std::slice::from_ref(tree))?);
        }
        assert_eq!(packed.len(), alone.len());
        for (packed, alone) in packed.iter().zip(&alone) {
            assert!(close(*packed, *alone, 1.0), "{shape:?}: {packed} in the batch, {alone} alone");
        }
    }
    Ok(())
}

#[test]
fn the_rows_of_a_pass_are_known_before_it_is_packed_and_no_more_than_allowed() -> Result<()> {
    for shape in SHAPES {
        let model = tiny_model(shape, false)?;
        // Of Phi-3's shape some are too long for one copy of their prompt.
        let trees =
            [tree(1, 5, &[4]), tree(2, 0, &[9, 2]), tree(3, 6, &[1, 3, 2]), tree(4, 12, &[2, 6]), tree(5, 1, &[2, 0])];
        for tree in &trees {
            assert_eq!(model.rows_of(tree), model.rows(&model.pack([tree])), "{shape:?}: {tree:?}");
            let first = &tree.answers[0];
            let alike = TokenTree { answers: vec![first.clone(); 3], ..tree.clone() };
            assert_eq!(model.rows_of_answers(tree.prompt.len(), 3, first.tokens.len()), model.rows_of(&alike));
        }
        for budget in [1, 13, 40, 400] {
            let passes = model.passes(&trees, budget);
            assert!(passes.iter().cloned().flatten().eq(0..trees.len()));
            let rows = |trees: &[TokenTree]| model.rows(&model.pack(trees));
            for pass in &passes {
                let own = rows(&trees[pass.clone()]);
                assert!(own <= budget || pass.len() == 1, "{shape:?}: {own} rows in {pass:?}, {budget} allowed");
                // As many as there is room for.
                let more = pass.start..trees.len().min(pass.end + 1);
                assert!(more == *pass || rows(&trees[more]) > budget, "{shape:?}: {pass:?} of {budget}");
            }
            let largest = passes.into_iter().map(|pass| rows(&trees[pass])).max();
            assert_eq!(Some(model.largest_pass(&trees, budget)), largest);
        }
    }
    Ok(())
}

#[test]
fn answers_that_share_a_prompt_give_loss_and_gradients_of_separate_sequences() -> Result<()> {
    for shape in SHAPES {
        let model = tiny_model(shape, true)?;
        let shared = tree(5, 11, &[3, 7, 1, 5]);
        let (shared_loss, shared_gradients) = loss_and_gradients(&model, std::slice::from_ref(&shared))?;
        let (loss, gradients) = loss_and_gradients(&model, &separated(&shared))?;
        assert!(close(shared_loss, loss, loss.abs()), "{shape:?}: loss {shared_loss} shared, {loss} separate");
        for ((name, shared), (_, separate)) in shared_gradients.iter().zip(&gradients) {
            let scale = separate.iter().fold(0f32, |scale, x| scale.max(x.abs()));
            for (shared, separate) in shared.iter().zip(separate) {
                assert!(close(*shared, *separate, scale), "{shape:?} {name}: {shared} shared, {separate} separate");
            }
        }
    }
    Ok(())
}

/// Greedy sampling through the cache picks at every step the token that a pass over everything so far makes most probable.
#[test]
fn generation_with_the_cache_equals_passes_without_it() -> Result<()> {
    for shape in SHAPES {
        let model = tiny_model(shape, false)?;
        let prompts = [7usize, 2, 13].map(|len| PromptTokens::from(tree(len as u64, len, &[]).prompt));
        let settings = SamplingSettings { temperature: 0.0, response_length: 9, ..Default::default() };
        let answers = answers_to(&model, &prompts, settings, &[3], 0, 0)?.answers;
        for (prompt, answers) in prompts.iter().zip(&answers) {
            assert_eq!(answers[0], answers[1]);
            let mut so_far = prompt.tokens.clone();
            for &token in &answers[0].tokens {
                let batch =
                    Batch::pack([&TokenTree { prompt: so_far.clone(), answers: vec![Continuation::default()] }]);
                let hidden = model.hidden(&batch, &Pass::default())?;
                let logits = model.logits(&hidden, &[so_far.len() as u32 - 1], &[])?.squeeze(0)?.to_vec1::<f32>()?;
                let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                assert!(best - logits[token as usize] < 1e-4, "{shape:?}: another token is more probable");
                so_far.push(token);
            }
            let ended = answers[0].tokens.last() == Some(&3);
            assert_eq!(answers[0].ended, ended);
            assert!(ended || answers[0].tokens.len() == 9);
        }
    }
    Ok(())
}

#[test]
fn what_an_answer_becomes_does_not_depend_on_its_company() -> Result<()> {
    let model = tiny_model(Shape::Llama, false)?;
    let prompts: Vec<PromptTokens> =
        (0..150).map(|index| tree(index, 1 + index as usize % 9, &[]).prompt.into()).collect();
    let settings = SamplingSettings { response_length: 6, ..Default::default() };
    let together = answers_to(&model, &prompts, settings, &[3, 5, 8], 4, 0)?.answers;
    for index in [0usize, 70, 149] {
        let alone = answers_to(&model, &prompts[index..=index], settings, &[3, 5, 8], 4, 2 * index as u64)?.answers;
        assert_same_answers(&alone[0], &together[index], "alone and together");
    }
    Ok(())
}

/// Whatever the cache holds at a time, prompts that begin alike are answered as each is alone.
#[test]
fn a_shared_beginning_and_the_size_of_the_cache_change_no_answer() -> Result<()> {
    for shape in SHAPES {
        let model = tiny_model(shape, false)?;
        let beginnings = [17usize, 23].map(|len| tree(len as u64, len, &[]).prompt);
        let prompt = |index: usize| {
            let end = tree(100 + index as u64, 1 + index % 5, &[]).prompt;
            // Two beginnings in turn, and some prompts without one.
            PromptTokens::from(match index % 3 {
                2 => end,
                beginning => [&beginnings[beginning][..], &end].concat(),
            })
        };
        let prompts: Vec<PromptTokens> = (0..14).map(prompt).collect();
        let sampling = SamplingSettings { response_length: 6, top_p: 0.95, ..Default::default() };
        let alone = |index: usize| {
            let generated = answers_to(&model, &prompts[index..=index], sampling, &[3], 4, 2 * index as u64)?;
            assert_eq!(generated.shared_tokens, 0);
            Ok(generated.answers)
        };
        let alone = (0..prompts.len()).map(alone).collect::<Result<Vec<_>>>()?;
        for kv_cache_tokens in [1, 80, 200, 10_000] {
            let sampling = SamplingSettings { kv_cache_tokens, ..sampling };
            let together = answers_to(&model, &prompts, sampling, &[3], 4, 0)?;
            // Five prompts each have one; of Phi-3's shape they are too long for rotations that are alike.
            let shared = if shape == Shape::Phi3 { 0 } else { 4 * (17 + 23) };
            assert_eq!(together.shared_tokens, shared, "{shape:?}, {kv_cache_tokens}");
            for (index, alone) in alone.iter().enumerate() {
                let what = format!("{shape:?}, prompt {index}, {kv_cache_tokens} tokens at a time");
                assert_same_answers(&together.answers[index], &alone[0], &what);
            }
        }
    }
    Ok(())
}
