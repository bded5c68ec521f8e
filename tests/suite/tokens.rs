//! From records to trees of tokens: what is shared, what is learned, what is cut.

use std::collections::BTreeMap;
use std::path::Path;

use rlhf::data::batch::TokenTree;
use rlhf::data::chat_counts::ChatCounts;
use rlhf::data::inspect::inspect;
use rlhf::data::schema::{Demonstration, Message, Origin, Prompt, Ranking, TemplateInputs, Text};
use rlhf::data::template::ChatTemplate;
use rlhf::data::tokenize::Tokenizer;
use rlhf::data::tokenize_records::{Ending, Truncation};
use rlhf::data::train_tokenizer::{SpecialTokens, train_bpe, train_bpe_on_files};
use tempfile::TempDir;

fn plain(text: &str) -> Text {
    Text::Plain(text.to_owned())
}
// ---- tokens ------------------------------------------------------------------------------------------------------

const CORPUS: &str = "\n\nHuman: Who keeps the hen?\n\nAssistant: Vubek keeps the hen. The passage does not say more.";

fn corpus() -> impl Iterator<Item = String> + Send {
    (0..50).map(|index| format!("{CORPUS} {index}"))
}

fn tokenizer(special_tokens: &SpecialTokens) -> Tokenizer {
    train_bpe(corpus(), 320, special_tokens).unwrap()
}

fn origin() -> Origin {
    Origin { file: Path::new("rows.parquet").into(), row: 3 }
}

fn demonstration(prompt: &str, completion: &str) -> Demonstration {
    Demonstration { prompt: Some(plain(prompt)), completion: plain(completion), origin: origin() }
}

/// What is counted of one record of plain texts: what was cut of it, and that it has a prompt.
fn cuts(prompts: usize, answers: usize) -> Truncation {
    Truncation { prompts, answers, chats: ChatCounts { prompts: 1, ..Default::default() }, ..Default::default() }
}

fn asked(prompt: Text) -> Prompt {
    Prompt { prompt, origin: origin(), columns: serde_json::Map::new() }
}

fn tokens(tokenizer: &Tokenizer, record: &Demonstration, max_length: usize) -> (TokenTree, Truncation) {
    let mut truncation = Truncation::default();
    (tokenizer.demonstration(record, max_length, &mut truncation).unwrap(), truncation)
}

#[test]
fn only_the_completion_and_eos_are_learned() {
    let tokenizer = tokenizer(&SpecialTokens::default());
    let (tree, truncation) = tokens(&tokenizer, &demonstration("Who keeps the hen?", " Vubek keeps it."), 100);
    assert_eq!(tree.prompt[0], tokenizer.bos().unwrap());
    assert_eq!(tokenizer.decode(&tree.prompt, true).unwrap(), "Who keeps the hen?");
    let answer = &tree.answers[0];
    assert_eq!(tokenizer.decode(&answer.tokens, false).unwrap(), " Vubek keeps it.</s>");
    assert!(answer.learned.iter().all(|&learned| learned));
    assert_eq!(truncation, cuts(0, 0));
}

#[test]
fn eos_is_learned_where_it_is_the_padding_token_too() {
    let special = SpecialTokens { pad: Some("<end>".into()), bos: None, eos: "<end>".into(), others: vec![] };
    let tokenizer = tokenizer(&special);
    assert_eq!(tokenizer.pad(), Some(tokenizer.eos().unwrap()));
    for completion in ["yes", "yes<end>"] {
        let (tree, _) = tokens(&tokenizer, &demonstration("Is it?", completion), 100);
        let answer = &tree.answers[0];
        let ends = answer.tokens.iter().filter(|&&token| token == tokenizer.eos().unwrap()).count();
        assert_eq!((ends, answer.tokens.last(), answer.learned.last()), (1, tokenizer.pad().as_ref(), Some(&true)));
    }
}

#[test]
fn bos_is_never_doubled() {
    let tokenizer = tokenizer(&SpecialTokens::default());
    let bos = tokenizer.bos().unwrap();
    assert_eq!(tokenizer.encode("<s>the hen").unwrap(), tokenizer.encode("the hen").unwrap());
    assert_eq!(tokenizer.encode("the hen").unwrap().iter().filter(|&&token| token == bos).count(), 1);
    assert_eq!(tokenizer.encode("").unwrap(), [bos]);
}

#[test]
fn the_tokenizers_file_says_whether_bos_is_added_and_its_configuration_does_not() {
    let folder = tempfile::tempdir().unwrap();
    tokenizer(&SpecialTokens::default()).save(folder.path()).unwrap();
    let path = folder.path().join("tokenizer_config.json");
    let config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for add in [true, false] {
        let mut config = config.clone();
        config["add_bos_token"] = add.into();
        config["bos_token"] = serde_json::json!({"content": "<s>", "lstrip": false});
        std::fs::write(&path, config.to_string()).unwrap();
        let tokens = Tokenizer::load(folder.path()).unwrap().encode("the").unwrap();
        assert_eq!(tokens.iter().filter(|&&token| token == 1).count(), 1);
    }
}

#[test]
fn a_token_across_the_boundary_belongs_to_the_answer() {
    let tokenizer = tokenizer(&SpecialTokens::default());
    // " hen" is one token, so the space at the end of the prompt is read together with the answer.
    let (tree, _) = tokens(&tokenizer, &demonstration("keeps the ", "hen"), 100);
    assert_eq!(tokenizer.decode(&tree.prompt, true).unwrap(), "keeps the");
    assert_eq!(tokenizer.decode(&tree.answers[0].tokens, true).unwrap(), " hen");
    assert_eq!(tree.answers[0].tokens.len(), 2);
}

#[test]
fn white_space_that_begins_an_answer_is_learned_whatever_the_post_processor() {
    let folder = tempfile::tempdir().unwrap();
    tokenizer(&SpecialTokens::default()).save(folder.path()).unwrap();
    let path = folder.path().join("tokenizer.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    // GPT-2's, which moves the offsets of tokens off white space.
    json["post_processor"] = serde_json::json!(
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}
    );
    std::fs::write(&path, json.to_string()).unwrap();
    let tokenizer = Tokenizer::load(folder.path()).unwrap();
    let (tree, _) = tokens(&tokenizer, &demonstration("Who?", "   Vubek"), 100);
    assert_eq!(tokenizer.decode(&tree.prompt, false).unwrap(), "Who?");
    assert!(tree.answers[0].learned.iter().all(|&learned| learned));
}

#[test]
fn answers_share_the_tokens_that_all_prompts_have_in_common() {
    let tokenizer = tokenizer(&SpecialTokens::default());
    let responses = [" Vubek keeps", " Vubek", "", " \u{1F414}"];
    let ranking = Ranking {
        prompt: plain("Who keeps the hen?"),
        responses: responses.map(plain).to_vec(),
        ranks: vec![0, 1, 2, 3],
        margin: None,
        weight: 1.0,
        agreement: None,
        origin: origin(),
    };
    let tree = tokenizer.ranking(&ranking, 100, &mut Truncation::default()).unwrap();
    assert_eq!(tokenizer.decode(&tree.prompt, true).unwrap(), "Who keeps the hen?");
    for (answer, response) in tree.answers.iter().zip(responses) {
        let together = tokenizer.encode(&format!("Who keeps the hen?{response}")).unwrap();
        assert_eq!([&tree.prompt[..], &answer.tokens[..answer.tokens.len() - 1]].concat(), together);
        assert_eq!(answer.tokens.last(), Some(&tokenizer.eos().unwrap()));
    }
    // Answers that begin alike share no token all the same: what is learned is never in the prompt.
    let alike = Ranking { responses: vec![plain(" Vubek keeps"), plain(" Vubek")], ..ranking.clone() };
    let tree = tokenizer.ranking(&alike, 100, &mut Truncation::default()).unwrap();
    assert_eq!(tokenizer.decode(&tree.prompt, true).unwrap(), "Who keeps the hen?");
    let across = Ranking { prompt: plain("keeps the "), responses: vec![plain("hen"), plain("1")], ..ranking };
    let tree = tokenizer.ranking(&across, 100, &mut Truncation::default()).unwrap();
    let [hen, one] = &tree.answers[..] else { panic!() };
    assert_eq!(tokenizer.decode(&hen.tokens, true).unwrap(), " hen");
    assert_eq!(tokenizer.decode(&one.tokens, true).unwrap(), " 1");
    assert!(hen.learned[0] && tree.learned_tokens() >= 4);
}

#[test]
fn long_prompts_lose_their_start_and_long_answers_their_end() {
    let tokenizer = tokenizer(&SpecialTokens::default());
    let record = demonstration(&vec!["who"; 200].join(" "), " Vubek keeps the hen.");
    let (whole, _) = tokens(&tokenizer, &record, usize::MAX);
    let (cut, truncation) = tokens(&tokenizer, &record, 40);
    assert_eq!(truncation, cuts(1, 0));
    assert_eq!((cut.tokens(), &cut.answers), (40, &whole.answers));
    assert_eq!(cut.prompt[0], tokenizer.bos().unwrap());
    assert!(whole.prompt.ends_with(&cut.prompt[1..]));

    let record = demonstration("Who?", &" hen".repeat(200));
    let (cut, truncation) = tokens(&tokenizer, &record, 40);
    assert_eq!(truncation, cuts(1, 1));
    assert_eq!((cut.tokens(), cut.prompt.len()), (40, 1));
    assert_ne!(cut.answers[0].tokens.last(), Some(&tokenizer.eos().unwrap()));
    assert_eq!(cut.answers[0].learned.len(), 39);

    let mut truncation = Truncation::default();
    let prompt = Prompt::new(plain(&"who ".repeat(200)), origin());
    let tokens = tokenizer.prompt(&prompt, 10, &mut truncation).unwrap();
    assert_eq!((tokens.len(), tokens[0], truncation.prompts), (10, tokenizer.bos().unwrap(), 1));
}

#[test]
fn scored_answers_get_eos_only_when_asked() {
    let tokenizer = tokenizer(&SpecialTokens::default());
    let tree = |ending| {
        tokenizer.tree(Some(&plain("Who?")), &[plain(" Vubek")], |_| ending, 100, &mut Truncation::default()).unwrap()
    };
    let (as_is, with_eos) = (tree(Ending::AsIs), tree(Ending::Eos));
    assert_eq!(with_eos.answers[0].tokens, [&as_is.answers[0].tokens[..], &[tokenizer.eos().unwrap()]].concat());
}

#[test]
fn an_answer_is_decoded_as_it_stands_behind_its_prompt() {
    let vocabulary = serde_json::json!({ "<unk>": 0, "\u{2581}What": 1, "\u{2581}red": 2, "ish": 3, ":": 4 });
    // The decoder of Llama 2 and Mistral, which drops the space that begins a text.
    let json = serde_json::json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": null, "post_processor": null,
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "\u{2581}" }, "content": " " }, { "type": "Fuse" },
            { "type": "Strip", "content": " ", "start": 1, "stop": 0 },
        ] },
        "model": { "type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>" },
    });
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
    let tokenizer = Tokenizer::load(folder.path()).unwrap();
    assert_eq!(tokenizer.decode(&[2, 3], true).unwrap(), "redish");
    assert_eq!(tokenizer.decode_answer(&[1, 4], &[2, 3]).unwrap(), " redish");
    assert_eq!(tokenizer.decode_answer(&[1], &[3]).unwrap(), "ish");
}

#[test]
fn a_tokenizer_depends_on_its_texts_alone_and_reads_back_what_it_saved() {
    let forward = tokenizer(&SpecialTokens::default());
    let mut texts: Vec<String> = corpus().collect();
    texts.reverse();
    let backward = train_bpe(texts.into_iter(), 320, &SpecialTokens::default()).unwrap();
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    forward.save(folders[0].path()).unwrap();
    backward.save(folders[1].path()).unwrap();
    let loaded = Tokenizer::load(folders[0].path()).unwrap();
    loaded.save(folders[2].path()).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        let read = |folder: &TempDir| std::fs::read(folder.path().join(name)).unwrap();
        assert_eq!(read(&folders[0]), read(&folders[1]));
        assert_eq!(read(&folders[0]), read(&folders[2]));
    }
    let text = "Vubek doesn\u{2019}t say \u{1F414}\t\n  1234";
    let ids = loaded.encode(text).unwrap();
    assert_eq!(ids, forward.encode(text).unwrap());
    assert_eq!(loaded.decode(&ids, true).unwrap(), text);
    assert!(loaded.vocabulary_size() <= 320);
}

#[test]
fn a_tokenizer_can_be_trained_on_the_files_themselves() {
    use arrow::array::{ArrayRef, RecordBatch, StringArray};
    use std::sync::Arc;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.parquet");
    let (prompts, completions): (Vec<String>, Vec<String>) =
        corpus().map(|text| (text.clone(), text.to_uppercase())).unzip();
    let column = |texts: &[String]| Arc::new(StringArray::from(texts.to_vec())) as ArrayRef;
    let rows = [("prompt", column(&prompts)), ("completion", column(&completions))];
    rlhf::data::parquet::write(&path, &RecordBatch::try_from_iter(rows).unwrap()).unwrap();
    let on_files = train_bpe_on_files(&path.display().to_string(), 400, &SpecialTokens::default()).unwrap();
    let on_texts = train_bpe(prompts.into_iter().chain(completions), 400, &SpecialTokens::default()).unwrap();
    let text = "Who keeps THE HEN?";
    assert_eq!(on_files.encode(text).unwrap(), on_texts.encode(text).unwrap());
    assert!(train_bpe_on_files("absent.parquet", 400, &SpecialTokens::default()).is_err());
}

#[test]
fn tokenizers_that_do_not_fit_are_refused() {
    let tokenizer = tokenizer(&SpecialTokens::default());
    let error = tokenizer.for_rows(2).eos().unwrap_err().to_string();
    assert!(error.contains("`eos_token` \"</s>\" has the id 2, for which the model's embedding of 2 rows"), "{error}");
    let error = train_bpe(corpus(), 100, &SpecialTokens::default()).err().unwrap().to_string();
    assert_eq!(error, "a vocabulary of 100 tokens is too small: bytes and special tokens alone are 259");
    let folder = tempfile::tempdir().unwrap();
    let error = Tokenizer::load(folder.path()).err().unwrap().to_string();
    assert!(error.contains("tokenizer.json: there is no such file"), "{error}");
}

#[test]
fn inspection_shows_every_token_with_its_loss() {
    let tokenizer = tokenizer(&SpecialTokens::default());
    let (tree, _) = tokens(&tokenizer, &demonstration("Who?\n", "\u{1F414}"), 100);
    let shown = inspect(&tree, &tokenizer).unwrap();
    assert_eq!(shown.lines().count(), 2 + tree.tokens());
    assert!(shown.contains("      0        1  no    \"<s>\"\n"), "{shown}");
    assert!(shown.contains("  no    \"\\n\"\n"), "{shown}");
    assert!(shown.ends_with("      1        2  yes   \"</s>\"\n"), "{shown}");
}

// ---- templates ---------------------------------------------------------------------------------------------------

const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + \
                      '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

fn chat_tokenizer(template: &str) -> Tokenizer {
    let special = SpecialTokens {
        pad: None,
        bos: Some("<s>".into()),
        eos: "<|im_end|>".into(),
        others: vec!["<|im_start|>".into()],
    };
    let folder = tempfile::tempdir().unwrap();
    tokenizer(&special).save(folder.path()).unwrap();
    std::fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
    Tokenizer::load(folder.path()).unwrap()
}

fn conversation() -> Demonstration {
    let messages =
        vec![Message::user("Hi"), Message::assistant("Hello"), Message::user("Why?"), Message::assistant("So")];
    Demonstration { prompt: None, completion: Text::messages(messages), origin: origin() }
}

#[test]
fn an_answer_that_was_cut_off_is_not_ended_by_its_template() {
    let tokenizer = chat_tokenizer(CHATML);
    let prompt = Text::messages(vec![Message::user("Why?")]);
    let answer = [Text::messages(vec![Message::assistant("Vubek keeps")])];
    let tokens = |ending| {
        let tree = tokenizer.tree(Some(&prompt), &answer, |_| ending, 100, &mut Truncation::default()).unwrap();
        tree.answers[0].tokens.clone()
    };
    let (ended, cut) = (tokens(Ending::Eos), tokens(Ending::Cut));
    assert_eq!(ended, [&cut[..], &[tokenizer.eos().unwrap()]].concat());
    assert_eq!(tokens(Ending::AsIs), ended);
}

/// The texts of the runs of learned tokens.
fn learned_runs(tokenizer: &Tokenizer, tree: &TokenTree) -> Vec<String> {
    let answer = &tree.answers[0];
    let mut runs: Vec<Vec<u32>> = Vec::new();
    for (index, (&token, &learned)) in answer.tokens.iter().zip(&answer.learned).enumerate() {
        if learned && (index == 0 || !answer.learned[index - 1]) {
            runs.push(Vec::new());
        }
        if learned {
            runs.last_mut().unwrap().push(token);
        }
    }
    runs.iter().map(|run| tokenizer.decode(run, false).unwrap()).collect()
}

#[test]
fn every_turn_of_the_assistant_is_learned_with_the_token_that_ends_it() {
    let tokenizer = chat_tokenizer(CHATML);
    let (tree, _) = tokens(&tokenizer, &conversation(), 200);
    assert_eq!(
        tokenizer.decode(&tree.prompt, false).unwrap(),
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    );
    assert_eq!(learned_runs(&tokenizer, &tree), ["Hello<|im_end|>", "So<|im_end|>"]);
    assert_eq!(tree.answers[0].tokens.last(), Some(&tokenizer.eos().unwrap()));
}

#[test]
fn a_turn_that_later_turns_change_is_not_learned() {
    // Earlier answers are shortened, as reasoning models' templates do.
    let source = "{% for message in messages %}[{{ message.role }}]{% if message.role == 'assistant' and not loop.last %}…\
                  {% else %}{{ message.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";
    let tokenizer = chat_tokenizer(source);
    let (tree, _) = tokens(&tokenizer, &conversation(), 200);
    assert_eq!(learned_runs(&tokenizer, &tree), ["So<|im_end|>"]);
    assert!(tokenizer.decode(&tree.prompt, false).unwrap().ends_with("[user]Hi[assistant]…[user]Why?[assistant]"));
}

#[test]
fn a_template_whose_text_shrinks_is_an_error_and_no_panic() {
    let source = "{{ 'long'[messages | length:] }}{% if add_generation_prompt %}{{ 'longer' }}{% endif %}";
    let tokenizer = chat_tokenizer(source);
    let error = tokenizer.demonstration(&conversation(), 100, &mut Truncation::default()).unwrap_err().to_string();
    assert!(error.contains("the answer cannot be told apart"), "{error}");
}

#[test]
fn a_chat_has_the_bos_that_its_template_writes_and_no_other() {
    let source = format!("{{{{ bos_token }}}}{CHATML}");
    let with = tokens(&chat_tokenizer(&source), &conversation(), 200).0;
    let without = tokens(&chat_tokenizer(CHATML), &conversation(), 200).0;
    let bos = chat_tokenizer(CHATML).bos().unwrap();
    assert_eq!(with.prompt, [&[bos], &without.prompt[..]].concat());
    assert_eq!(with.answers, without.answers);
    // A string gets it.
    let prompt = asked(Text::Plain("Hi".into()));
    let tokens = chat_tokenizer(CHATML).prompt(&prompt, 100, &mut Truncation::default()).unwrap();
    assert_eq!(tokens[0], bos);
}

#[test]
fn what_learns_by_the_plain_template_is_saved_with_it() {
    let special = SpecialTokens { bos: Some("<s>".into()), ..SpecialTokens::default() };
    let first = tokenizer(&special);
    assert_eq!(first.transcript(), None);
    let (tree, _) = tokens(&first, &conversation(), 200);
    assert_eq!(tree.prompt[0], first.bos().unwrap());
    let folder = tempfile::tempdir().unwrap();
    first.save(folder.path()).unwrap();
    let saved = Tokenizer::load(folder.path()).unwrap();
    assert!(saved.has_template());
    assert_eq!(tokens(&saved, &conversation(), 200).0, tree);
}

#[test]
fn prompts_that_end_inside_a_token_are_counted() {
    let tokenizer = tokenizer(&SpecialTokens::default());
    let counts = |prompt: &str, completion: &str| {
        let (_, truncation) = tokens(&tokenizer, &demonstration(prompt, completion), 200);
        let chats = truncation.chats;
        (chats.prompts, chats.split_prompts, chats.spaced_prompts)
    };
    assert_eq!(counts("Vubek keeps", " the hen"), (1, 0, 0));
    assert_eq!(counts("Vubek keeps ", "the hen"), (1, 1, 0));
    // No token reaches over the end, but the model was asked as it learned.
    assert_eq!(counts("Vubek keeps ", "9"), (1, 0, 1));
    assert_eq!(counts("Vubek keeps\n", "9"), (1, 0, 0));
    assert_eq!(counts("Vubek keeps ", ""), (0, 0, 0));
    let prompt = asked(Text::Plain("Vubek keeps ".into()));
    let mut truncation = Truncation::default();
    tokenizer.prompt(&prompt, 100, &mut truncation).unwrap();
    assert_eq!((truncation.chats.prompts, truncation.chats.spaced_prompts), (1, 1));
}

#[test]
fn a_prompt_that_ends_in_an_answer_is_what_its_continuation_was_learned_behind() {
    let tokenizer = chat_tokenizer(CHATML);
    let turns = vec![Message::user("Why?"), Message::assistant("It is")];
    let prompt = asked(Text::messages(turns));
    let asked = tokenizer.prompt(&prompt, 100, &mut Truncation::default()).unwrap();
    let learned = Demonstration {
        prompt: Some(prompt.prompt),
        completion: Text::messages(vec![Message::assistant(" so")]),
        origin: origin(),
    };
    let (tree, _) = tokens(&tokenizer, &learned, 200);
    assert_eq!(tree.prompt, asked);
    assert_eq!(learned_runs(&tokenizer, &tree), [" so<|im_end|>"]);
}

#[test]
fn models_without_a_template_get_the_plain_one() {
    let tokenizer = tokenizer(&SpecialTokens::default());
    assert!(!tokenizer.has_template());
    let (tree, _) = tokens(&tokenizer, &conversation(), 200);
    assert_eq!(tokenizer.decode(&tree.prompt, true).unwrap(), "\n\nHuman: Hi\n\nAssistant:");
    assert_eq!(learned_runs(&tokenizer, &tree), [" Hello", " So</s>"]);
}

#[test]
fn what_a_template_refuses_names_the_row() {
    let source = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('System first!') }}{% endif %}";
    let tokenizer = chat_tokenizer(source);
    let error = tokenizer.demonstration(&conversation(), 100, &mut Truncation::default()).unwrap_err().to_string();
    assert!(error.starts_with("rows.parquet: row 3 (counted from 0): "), "{error}");
    assert!(
        error.ends_with("chat_template.jinja: the chat template rejects the conversation: System first!"),
        "{error}"
    );
}

#[test]
fn templates_have_the_functions_of_transformers() {
    let render = |source: &str, generation: bool| {
        let special = BTreeMap::from([("eos_token".to_owned(), "</s>".to_owned())]);
        let template = ChatTemplate::from_source(source, "t.jinja", &special).unwrap();
        template
            .apply(&[Message::user(" a,b "), Message::assistant("é")], &TemplateInputs::default(), generation)
            .unwrap()
    };
    assert_eq!(render("{{ messages[0].content.strip().split(',')[-1] }}{{ eos_token }}", false), "b</s>");
    assert_eq!(render("{{ messages[1] | tojson }}", false), r#"{"role": "assistant", "content": "é"}"#);
    assert_eq!(render("{{ [1, 2.5, none, '<'] | tojson(indent=2) }}", false), "[\n  1,\n  2.5,\n  null,\n  \"<\"\n]");
    assert_eq!(render("{{ add_generation_prompt }}{{ tools is none }}", true), "TrueTrue");
    assert_eq!(
        render("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}", false),
        "assistant"
    );
    assert_eq!(
        render(
            "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}\n",
            false
        ),
        " a,b \n"
    );
    assert_eq!(render("{%- generation -%} x {%- endgeneration %}", false), "x");
    assert_eq!(render("{{ none is iterable }}{{ messages is iterable }}{{ 'a' is iterable }}", false), "FalseTrueTrue");
    assert_eq!(render("{{ strftime_now('%Y') | length }}", false), "4");
}
