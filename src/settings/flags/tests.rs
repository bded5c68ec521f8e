use std::collections::BTreeSet;

use clap::{Arg, ArgAction};
use serde::Serialize;

use super::*;
use crate::evaluate::EvaluateSettings;
use crate::export::ExportSettings;
use crate::ppo::settings::PpoSettings;
use crate::reward::RewardSettings;
use crate::sample::SampleSettings;
use crate::score::ScoreSettings;
use crate::settings::{PipelineSettings, from_arguments, resolved_from, save};
use crate::sft::SftSettings;
use crate::world::settings::WorldSettings;

/// A mode in words, flags that choose it, and flags that choose another. Where programs differ, the program's name is first.
type Example = (&'static str, &'static [&'static str], &'static [&'static str]);

const EXAMPLES: &[Example] = &[
    ("without --evaluation-data", &[], &["--evaluation-data=e"]),
    ("without --warmup-steps", &[], &["--warmup-steps=3"]),
    ("with --warmup-steps or --warmup-ratio above 0", &[], &["--warmup-ratio=0"]),
    ("with --schedule cosine or linear", &["--schedule=linear"], &["--schedule=constant"]),
    ("with --method lora", &["--method=bitfit+lora"], &["--method=ia3"]),
    ("with --method lora or ia3", &["--method=ia3"], &["--method=bitfit"]),
    ("with --method ia3", &["--method=ia3"], &["--method=lora"]),
    ("with --method adapters", &["--method=adapters"], &[]),
    ("with --method probing", &["--method=probing"], &[]),
    ("with --method bitfit", &["--method=bitfit"], &[]),
    (
        "with --method prompt-tuning, p-tuning, prefix-tuning or p-tuning-v2",
        &["--method=p-tuning-v2"],
        &["--method=lora"],
    ),
    ("with --method prompt-tuning or prefix-tuning", &["--method=prompt-tuning"], &["--method=p-tuning"]),
    (
        "with --prompt-tuning-init text or class-labels and --method prompt-tuning or prefix-tuning",
        &["--method=prefix-tuning", "--prompt-tuning-init=text"],
        &["--method=prefix-tuning", "--prompt-tuning-init=random"],
    ),
    ("with --method p-tuning", &["--method=p-tuning"], &["--method=p-tuning-v2"]),
    (
        "with --method p-tuning, or prefix-tuning and --prefix-projection",
        &["--method=prefix-tuning", "--prefix-projection"],
        &["--method=prefix-tuning"],
    ),
    (
        "with --method p-tuning and --encoder-reparameterization-type lstm",
        &["--method=p-tuning", "--encoder-reparameterization-type=lstm"],
        &["--method=p-tuning"],
    ),
    ("with --method prefix-tuning", &["--method=prefix-tuning"], &["--method=p-tuning-v2"]),
    ("with --adapters", &["--adapters=a=b"], &[]),
    ("with a --temperature above 0", &["--temperature=0.1"], &["--temperature=0"]),
    ("with --objective classification", &["--objective=classification"], &[]),
    (
        "with --objective classification and --label-words",
        &["--objective=classification", "--label-words=a,b"],
        &["--objective=classification"],
    ),
    (
        "with --objective classification and no --label-words",
        &["--objective=classification"],
        &["--objective=classification", "--label-words=a,b"],
    ),
    (
        "with --objective classification and no --label-words, or with --method probing",
        &["--objective=classification"],
        &["--objective=classification", "--label-words=a,b"],
    ),
    ("with --objective dpo", &["--objective=dpo"], &["--objective=classification"]),
    (
        "with --objective dpo and --preference-loss sigmoid",
        &["--objective=dpo"],
        &["--objective=dpo", "--preference-loss=ipo"],
    ),
    ("with --normalize mean or mean-and-variance", &[], &["--normalize=none"]),
    ("with --reward-model", &["--reward-model=r"], &["--reward-command=c"]),
    ("with --reward-command", &["--reward-command=c"], &["--reward-model=r"]),
    ("with --reward-rule", &["--reward-rule=exact"], &["--reward-model=r"]),
    (
        "with --reward-combination mean of several sources of rewards, or with --reward-combination sum",
        &["--reward-model=r", "--reward-command=c"],
        &["--reward-model=r"],
    ),
    (
        "with several sources of rewards, or with --reward-weights",
        &["--reward-model=r", "--reward-command=c"],
        &["--reward-model=r"],
    ),
    (
        "with --reward-combination mean-minus-deviation",
        &["--reward-model=r", "--reward-model=s", "--reward-combination=mean-minus-deviation"],
        &["--reward-model=r", "--reward-model=s"],
    ),
    ("with --reward-command or --judge-command", &["--reward-command=c"], &["--reward-model=r"]),
    ("with --value-from policy and --algorithm ppo", &["--value-from=policy"], &["--reward-model=r"]),
    (
        "with --value-from policy and --algorithm ppo, or with --method probing",
        &["--algorithm=rloo", "--method=probing"],
        &["--algorithm=rloo"],
    ),
    ("with --algorithm ppo", &["--algorithm=ppo"], &["--algorithm=grpo"]),
    ("with --whiten-advantages or --whiten-rewards", &[], &["--whiten-advantages=none"]),
    ("without --missing-eos-score", &[], &["--missing-eos-score=-1"]),
    ("with a --kl-coefficient above 0", &[], &["--kl-coefficient=0"]),
    ("with --kl-controller adaptive", &["--kl-controller=adaptive"], &[]),
    ("with more than one of --ppo-epochs", &[], &["--ppo-epochs=1"]),
    ("with --ptx-data", &["--ptx-data=t"], &[]),
    ("with a --sample-every above 0", &[], &["--sample-every=0"]),
    ("with --evaluation-data", &["--evaluation-data=e"], &[]),
    (
        "with --evaluation-data and --judge-rule",
        &["--evaluation-data=e", "--judge-rule=exact"],
        &["--evaluation-data=e"],
    ),
    ("without --files-only", &[], &["--files-only"]),
    ("where models answer or are asked something", &["--models=a=b"], &["--answers=a"]),
    ("where answers are judged: with --data or --answers", &["--answers=a"], &["--models=a=b", "--votes=v"]),
    ("evaluate with --reward-model", &["--models=a=b", "--reward-model=r"], &["--models=a=b"]),
    ("where models answer prompts (--data)", &["--models=a=b"], &["--models=a=b", "--toxicity-prompts=t"]),
    (
        "with --adapters, where models answer prompts (--data)",
        &["--models=a=b", "--data=d", "--adapters=a=b"],
        &["--models=a=b", "--data=d"],
    ),
    ("without --answers", &["--models=a=b"], &["--answers=a"]),
    (
        "where models answer prompts (--data) or continue some (--toxicity-prompts)",
        &["--models=a=b", "--toxicity-prompts=t"],
        &["--models=a=b", "--multiple-choice=m"],
    ),
    (
        "where models answer prompts (--data) or --tasks, or continue some (--toxicity-prompts)",
        &["--models=a=b", "--toxicity-prompts=t"],
        &["--models=a=b", "--multiple-choice=m"],
    ),
    (
        "with a --temperature above 0, where models answer prompts (--data) or continue some (--toxicity-prompts)",
        &["--models=a=b", "--toxicity-prompts=t"],
        &["--models=a=b", "--temperature=0"],
    ),
    (
        "with a --temperature above 0, where models answer prompts (--data): continuations have --toxicity-top-p",
        &["--models=a=b"],
        &["--models=a=b", "--toxicity-prompts=t"],
    ),
    (
        "where models answer prompts (--data) or --tasks: continuations have --toxicity-response-length",
        &["--models=a=b", "--tasks=t"],
        &["--models=a=b", "--toxicity-prompts=t"],
    ),
    (
        "where texts are judged: with --data, --answers, --toxicity-prompts or --labelled",
        &["--models=a=b", "--toxicity-prompts=t"],
        &["--models=a=b", "--perplexity=p"],
    ),
    (
        "where texts are judged: with --data, --answers or --labelled",
        &["--labelled=l"],
        &["--models=a=b", "--toxicity-prompts=t"],
    ),
    ("with --toxicity-prompts", &["--models=a=b", "--toxicity-prompts=t"], &["--models=a=b"]),
    (
        "with --toxicity-prompts and a --temperature above 0",
        &["--models=a=b", "--toxicity-prompts=t"],
        &["--models=a=b", "--toxicity-prompts=t", "--temperature=0"],
    ),
    ("with --multiple-choice", &["--models=a=b", "--multiple-choice=m"], &["--models=a=b"]),
    ("with --recognition", &["--models=a=b", "--recognition=m"], &["--models=a=b"]),
    ("with --tasks", &["--models=a=b", "--tasks=m"], &["--models=a=b"]),
    ("with --labelled", &["--labelled=l"], &["--votes=v"]),
    (
        "where a model reads: with --models or --reward-model",
        &["--answers=a", "--reward-model=r"],
        &["--answers=a", "--toxicity-scorer=rule"],
    ),
];

/// Values of which every flag takes one.
const VALUES: [&str; 5] = ["1", "0.5", "x=1", "5min", "x"];

/// Goes through all flags of a program: each has one entry in the table, and each that some mode does not read is refused there and
/// accepted in a mode that reads it. Gives the modes that it went through.
fn go_through<S: Program>(needed: &[&'static str]) -> BTreeSet<String> {
    let (mut command, flags) = (S::command(), S::flags());
    command.build();
    let program = command.get_name().to_string();
    let arguments =
        || command.get_arguments().filter(|argument| !["help", "version"].contains(&argument.get_id().as_str()));
    for Flag { id, .. } in &flags.0 {
        assert!(
            arguments().any(|argument| argument.get_id() == id),
            "{program}: the table has `{id}`, which is no flag"
        );
    }
    let mut modes = BTreeSet::new();
    for argument in arguments() {
        let (id, name) = (argument.get_id().as_str(), format!("--{}", argument.get_long().unwrap()));
        let entries: Vec<&Flag<S>> = flags.0.iter().filter(|flag| flag.id == id).collect();
        let [entry] = entries[..] else {
            panic!(
                "{program} {name} has {} entries in `{program}`'s `Program::flags`, expected one: add `{id}` to `always` if every mode of the program \
                 reads it, or to `only` with the mode that does",
                entries.len()
            );
        };
        let words = match &entry.read {
            Read::Always => continue,
            Read::Never => "",
            Read::Only(mode) => mode.words,
        };
        let with = |others: &[&'static str], flag: &str| {
            let arguments = needed.iter().chain(others).map(|text| text.to_string()).chain([flag.to_string()]);
            from_arguments::<S>(arguments)
        };
        let refused = |others: &[&'static str], flag: &str| {
            let error = with(others, flag).err().unwrap_or_else(|| panic!("{program} {flag} is read with {others:?}"));
            assert_eq!(error.exit_code(), 2);
            let sentence = error.to_string();
            let named = sentence.starts_with(&name) && sentence.contains(words) && sentence.contains("no effect");
            assert!(named, "{program} {flag}: {sentence}");
        };
        if words.is_empty() {
            refused(&[], &written::<S>(argument, &name, needed));
            continue;
        }
        let own = format!("{program} {words}");
        let example = EXAMPLES.iter().find(|(mode, ..)| *mode == own);
        let example = example.or_else(|| EXAMPLES.iter().find(|(mode, ..)| *mode == words));
        let Some((mode, chosen, other)) = example else {
            panic!("{program} {name} is read only {words}: there is no example of that mode; add one to EXAMPLES");
        };
        modes.insert(mode.to_string());
        let both: Vec<&str> = needed.iter().chain(*chosen).copied().collect();
        let flag = written::<S>(argument, &name, &both);
        if let Err(error) = with(chosen, &flag) {
            panic!("{program} {flag} with {chosen:?}: {error}");
        }
        refused(other, &flag);
    }
    modes
}

/// The flag with a value that it takes.
fn written<S: Program>(argument: &Arg, name: &str, others: &[&str]) -> String {
    if matches!(argument.get_action(), ArgAction::SetTrue) {
        return name.to_string();
    }
    let possible: Vec<String> =
        argument.get_possible_values().iter().map(|value| value.get_name().to_string()).collect();
    let values = possible.into_iter().chain(VALUES.map(String::from)).map(|value| format!("{name}={value}"));
    let is_taken = |flag: &String| {
        let arguments =
            others.iter().map(|text| text.to_string()).filter(|other| !other.starts_with(&format!("{name}=")));
        resolved_from::<S>(arguments.chain([flag.clone()])).and_then(|resolved| resolved.settings::<S>()).is_ok()
    };
    values.into_iter().find(is_taken).unwrap_or_else(|| panic!("none of the values {VALUES:?} is one of {name}"))
}

#[test]
fn every_flag_of_every_program_is_read_or_refused() {
    let model = ["--model=m", "--data=d", "--output=o"];
    let modes = [
        go_through::<SftSettings>(&model),
        go_through::<RewardSettings>(&model),
        go_through::<PpoSettings>(&model),
        go_through::<SampleSettings>(&model),
        go_through::<ScoreSettings>(&model),
        go_through::<ExportSettings>(&["--model=m", "--output=o"]),
        go_through::<EvaluateSettings>(&["--output=o"]),
        go_through::<PipelineSettings>(&[]),
        go_through::<WorldSettings>(&[]),
    ];
    let seen: BTreeSet<String> = modes.into_iter().flatten().collect();
    let left = EXAMPLES.iter().find(|(mode, ..)| !seen.contains(*mode));
    assert!(left.is_none(), "no flag is read only {}", left.unwrap().0);
}

#[test]
fn flags_of_one_mode_are_refused_in_one_sentence() {
    let refused = |flags: &[&str]| {
        let needed = ["--model=m", "--data=d", "--output=o"];
        from_arguments::<SftSettings>(needed.iter().chain(flags)).unwrap_err().to_string()
    };
    assert_eq!(
        refused(&["--lora-r=4", "--lora-alpha=8", "--use-dora", "--beta=0.2"]),
        "--beta has no effect here: it is read only with --objective dpo; leave it out"
    );
    assert_eq!(
        refused(&["--lora-r=4", "--lora-alpha=8", "--use-dora"]),
        "--lora-r, --lora-alpha and --use-dora have no effect here: they are read only with --method lora; leave them out"
    );
    let export =
        from_arguments::<ExportSettings>(["--model=m", "--output=o", "--max-length=9"]).unwrap_err().to_string();
    assert_eq!(export, "--max-length has no effect here: `export` does not read it; leave it out");
}

/// Settings as a run records them, read again with more flags.
fn again<S: Program + Serialize>(settings: &S, flags: &[&str]) -> Result<S> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("settings.toml");
    save(settings, &path).unwrap();
    from_arguments(["--settings", path.to_str().unwrap()].iter().chain(flags))
}

#[test]
fn a_record_holds_every_default_and_is_read_again() {
    let needed = ["--model=m", "--data=d", "--output=o"];
    let sft = |flags: &[&str]| from_arguments::<SftSettings>(needed.iter().chain(flags)).unwrap();
    for flags in [&[][..], &["--method=lora", "--lora-r=4"], &["--objective=dpo", "--warmup-steps=3", "--epsilon=1e-5"]]
    {
        assert!(again(&sft(flags), &[]).is_ok(), "{flags:?}");
    }
    // What was read there and is not read now was chosen by somebody.
    let error = again(&sft(&["--method=lora", "--lora-r=4"]), &["--method=full"]).unwrap_err().to_string();
    let expected =
        "settings.toml: `lora_r` has no effect here: it is read only with --method lora; remove it from the file";
    assert!(error.ends_with(expected), "{error}");
    assert!(again(&sft(&["--method=lora"]), &["--method=full"]).is_ok());
    let ppo = |flags: &[&str]| {
        from_arguments::<PpoSettings>(needed.iter().chain(&["--reward-model=r"]).chain(flags)).unwrap()
    };
    for preset in ["instructgpt", "n-plus", "trl"] {
        for algorithm in ["ppo", "rloo", "grpo"] {
            let flags = [format!("--preset={preset}"), format!("--algorithm={algorithm}")];
            let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
            assert!(again(&ppo(&flags), &[]).is_ok(), "{flags:?}");
        }
    }
    // The preset's default is no value that somebody chose; another one is.
    assert!(again(&ppo(&["--preset=instructgpt"]), &["--algorithm=rloo"]).is_ok());
    let chosen = again(&ppo(&["--preset=instructgpt", "--value-learning-rate=1e-4"]), &["--algorithm=rloo"]);
    assert!(chosen.unwrap_err().to_string().contains("`value_learning_rate` has no effect here"));
}
