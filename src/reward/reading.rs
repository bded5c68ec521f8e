//! From rows to what a reward model reads: ranked answers as tokens, and the answers whose mean reward becomes 0.

use super::{Normalization, RewardSettings};
use crate::adapt;
use crate::bail;
use crate::data::answer_reader::AnswerReader;
use crate::data::batch::TokenTree;
use crate::data::pairs::{Pair, RankedTokens, by_tokens, ranked_tokens};
use crate::data::schema::{DEMONSTRATIONS, Demonstration, RANKINGS, Ranking};
use crate::data::tokenize::Tokenizer;
use crate::data::tokenize_records::{Ending, Truncation};
use crate::error::Result;
use crate::train::examples::{Examples, Source, values};

/// Of data larger than a window, the examples whose mean reward stands for that of all.
const MOST_FOR_ZERO_POINT: usize = 10_000;

/// A prompt with its ranked answers, as tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct RankedTree {
    /// Prompt and answers.
    pub tree: TokenTree,
    /// The rank of each answer, lower is better.
    pub ranks: Vec<i64>,
    /// For each answer the first one that has the same tokens.
    pub same_as: Vec<usize>,
    /// The pairs of answers that are no tie and differ.
    pub pairs: Vec<Pair>,
    /// By how much a better answer's score has to be higher, where the data says so.
    pub margin: Option<f32>,
    /// How much the prompt counts.
    pub weight: f32,
    /// The share of labellers who agree with the order, where the data says so.
    pub agreement: Option<f32>,
}

/// Reads examples in the way that the model wants them.
pub(super) struct Reader {
    /// The model's tokenizer.
    pub tokenizer: Tokenizer,
    /// An encoder reads prompt and answer as a pair of texts.
    pub(super) is_encoder: bool,
    max_length: usize,
}

impl Reader {
    /// For the model of the settings.
    pub fn new(settings: &RewardSettings) -> Result<Self> {
        let tokenizer = adapt::tokenizer(&settings.model.model, &settings.model.adapter)?;
        let is_encoder = !adapt::architecture(&settings.model.model)?.causal;
        Ok(Reader { tokenizer, is_encoder, max_length: settings.common.max_length })
    }

    fn reader(&self, max_length: usize) -> AnswerReader<'_> {
        AnswerReader { tokenizer: &self.tokenizer, is_encoder: self.is_encoder, max_length }
    }

    fn ranking(&self, ranking: &Ranking, max_length: usize, truncation: &mut Truncation) -> Result<TokenTree> {
        let Ranking { prompt, responses, origin, .. } = ranking;
        self.reader(max_length).tree(Some(prompt), responses, origin, |_| Ending::Eos, truncation)
    }

    fn demonstration(&self, demonstration: &Demonstration, truncation: &mut Truncation) -> Result<TokenTree> {
        let Demonstration { prompt, completion, origin } = demonstration;
        let answers = std::slice::from_ref(completion);
        self.reader(self.max_length).tree(prompt.as_ref(), answers, origin, |_| Ending::Eos, truncation)
    }

    /// The rankings of a run; those in which no answer is better than another that differs are left out.
    pub fn rankings(&self, settings: &RewardSettings) -> Result<Examples<'_, RankedTree>> {
        let source = Source::new(&settings.data, &settings.examples, &settings.training, &settings.common);
        let examples = Examples::open(&source, RANKINGS, |ranking: Ranking, truncation| {
            let tokenize = |ranking: &Ranking, max_length, truncation: &mut Truncation| {
                self.ranking(ranking, max_length, truncation)
            };
            let tokens = ranked_tokens(&ranking, self.max_length, truncation, tokenize, by_tokens)?;
            let Ranking { ranks, margin, weight, agreement, .. } = ranking;
            Ok(tokens.map(|RankedTokens { tree, same_as, pairs }| RankedTree {
                tree,
                ranks,
                same_as,
                pairs,
                margin,
                weight,
                agreement,
            }))
        })?;
        if let Some(pattern) = examples.nothing_in(&source) {
            let lost = if pattern == source.data { examples.truncation() } else { examples.evaluation_truncation() };
            bail!(
                "{pattern}: no ranking is left after reading (the answers of {} were one tie, of {} all the same); at least one prompt with a better \
                 and a worse answer that differ is needed",
                lost.ties,
                lost.without_pairs
            );
        }
        Ok(examples)
    }
}

/// The answers whose mean reward becomes 0.
pub(super) struct ZeroPoint {
    /// Prompts with these answers.
    pub trees: Vec<TokenTree>,
    /// What they are, in words; none where scores stay as they are.
    pub of: Option<String>,
}

/// The trees whose mean reward becomes 0: the demonstrations, or the prompts with their best-ranked answers; of data larger than a window a sample.
pub(super) fn zero_point(
    settings: &RewardSettings,
    examples: &mut Examples<RankedTree>,
    reader: &Reader,
) -> Result<ZeroPoint> {
    if settings.normalize == Normalization::None {
        return Ok(ZeroPoint { trees: Vec::new(), of: None });
    }
    let (trees, is_sample, cut): (Vec<TokenTree>, bool, usize) = match &settings.demonstrations {
        None => {
            let some = examples.training_or_some(MOST_FOR_ZERO_POINT)?;
            // What was cut of them is counted among the rankings.
            (values(&some).into_iter().map(best_answers).collect(), examples.is_streamed(), 0)
        }
        Some(pattern) => {
            let source = Source::new(pattern, &settings.examples, &settings.training, &settings.common);
            let source = Source { evaluation_data: None, evaluation_share: 0.0, ..source };
            let mut examples = Examples::open(&source, DEMONSTRATIONS, |demonstration, truncation| {
                reader.demonstration(&demonstration, truncation).map(Some)
            })?;
            if examples.is_empty() {
                bail!(
                    "{pattern}: there is no demonstration in it, whose mean reward could become 0; leave --demonstrations out"
                );
            }
            let some = examples.training_or_some(MOST_FOR_ZERO_POINT)?;
            let cut = examples.truncation().prompts + examples.truncation().answers;
            (values(&some).into_iter().cloned().collect(), examples.is_streamed(), cut)
        }
    };
    let of = if settings.demonstrations.is_some() { "demonstrations" } else { "rankings' best answers" };
    let count = indicatif::HumanCount(trees.len() as u64);
    let random = if is_sample { " random" } else { "" };
    let cut = if cut > 0 { format!(", of which {cut} were cut by --max-length") } else { String::new() };
    Ok(ZeroPoint { of: Some(format!("over {count}{random} {of}{cut}")), trees })
}

/// The prompt with its best-ranked answers only.
fn best_answers(ranked: &RankedTree) -> TokenTree {
    let best = ranked.ranks.iter().min();
    let answers = ranked.tree.answers.iter().zip(&ranked.ranks).filter(|(_, rank)| Some(*rank) == best);
    TokenTree { prompt: ranked.tree.prompt.clone(), answers: answers.map(|(answer, _)| answer.clone()).collect() }
}
