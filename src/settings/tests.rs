use super::*;
use clap::CommandFactory;
use clap::error::ErrorKind;
use serde::Deserialize;

/// A program for tests.
#[derive(Debug, Clone, PartialEq, Parser, Serialize, Deserialize)]
#[command(name = "tune")]
struct Tune {
    #[command(flatten)]
    #[serde(flatten)]
    common: CommonSettings,
    #[command(flatten)]
    #[serde(flatten)]
    model: ModelSettings,
    #[command(flatten)]
    #[serde(flatten)]
    training: TrainingSettings,
    /// Files to read
    #[arg(long, num_args = 1.., required = true)]
    data: Vec<String>,
}

impl Program for Tune {
    fn flags() -> Flags<Self> {
        Flags::new()
            .of(|tune: &Self| &tune.common, CommonSettings::flags())
            .of(|tune: &Self| &tune.model, ModelSettings::flags())
            .of(|tune: &Self| &tune.training, TrainingSettings::flags())
            .always(&["data", "pooling", "probe_hidden_size"])
    }
}

const NEEDED: [&str; 6] = ["--output", "out", "--model", "base", "--data", "a.parquet"];

fn tune(arguments: &[&str]) -> Result<Tune> {
    from_arguments(NEEDED.iter().chain(arguments))
}

/// The outcome of a settings file with this text and of these arguments.
fn with_file(text: &str, arguments: &[&str]) -> Result<Tune> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tune.toml");
    std::fs::write(&path, text).unwrap();
    from_arguments(["--settings", path.to_str().unwrap()].iter().chain(arguments))
}

fn sentence(result: Result<Tune>) -> String {
    let error = result.expect_err("the settings are faulty");
    assert_eq!(error.exit_code(), 2);
    let sentence = error.to_string();
    assert!(!sentence.contains('\n'), "{sentence}");
    sentence
}

#[test]
fn every_flag_is_defined_consistently() {
    Tune::command().debug_assert();
    let mut command = Tune::command();
    command.build();
    for argument in command.get_arguments() {
        assert!(argument.get_help().is_some(), "--{} has no help", argument.get_long().unwrap_or_default());
    }
    // A program's own flags, which follow the groups, are not under a group's heading.
    let heading =
        |id: &str| command.get_arguments().find(|argument| argument.get_id() == id).unwrap().get_help_heading();
    assert_eq!((heading("data"), heading("beta1"), heading("max_steps")), (None, Some("Optimizer"), Some("Training")));
}

#[test]
fn the_file_supplies_what_is_required_and_flags_win_over_it() {
    let text = r#"
        output = "out"
        model = "base"
        data = ["a.parquet", "b.parquet"]
        batch-size = 7
        max_length = 99
        learning_rate = 1
        method = "lora"
        use-rslora = true
        quiet = false
        schedule = "linear"
    "#;
    let tune = with_file(text, &["--batch-size", "8", "--data", "c.parquet"]).unwrap();
    assert_eq!(tune.training.batch_size, 8);
    assert_eq!(tune.common.max_length, 99);
    assert_eq!(tune.training.learning_rate(2e-5), 1.0);
    assert_eq!(tune.data, ["c.parquet"]);
    assert!(tune.training.methods.lora.use_rslora && !tune.common.quiet);
    assert_eq!(tune.training.optimizer.schedule, ScheduleShape::Linear);
    assert_eq!(with_file(text, &[]).unwrap().data, ["a.parquet", "b.parquet"]);
}

#[test]
fn the_record_read_as_settings_or_by_serde_gives_the_same_settings() {
    let settings =
        tune(&["--method", "lora", "--threads", "3", "--learning-rate", "3e-7", "--target-modules", "q_proj,v_proj"])
            .unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run/settings.toml");
    save(&settings, &path).unwrap();
    let record = std::fs::read_to_string(&path).unwrap();
    let mut again = with_file(&record, &[]).unwrap();
    again.common.settings = None;
    assert_eq!(again, settings);
    assert_eq!(toml::from_str::<Tune>(&record).unwrap(), settings);
    assert_eq!(settings.training.methods.lora.target_modules, ["q_proj", "v_proj"]);
    assert!(!record.contains("settings"), "{record}");
}

#[test]
fn low_rank_updates_have_their_own_default_learning_rate_from_either_source() {
    let needed = "output = 'out'\nmodel = 'base'\ndata = ['a']\n";
    let rate = |result: Result<Tune>| result.unwrap().training.learning_rate(2e-5);
    assert_eq!(rate(tune(&[])), 2e-5);
    assert_eq!(rate(tune(&["--method", "lora"])), 2e-4);
    assert_eq!(rate(tune(&["--method", "lora", "--learning-rate", "1e-3"])), 1e-3);
    assert_eq!(rate(with_file(&format!("{needed}method = 'lora'"), &[])), 2e-4);
    assert_eq!(rate(with_file(&format!("{needed}method = 'lora'"), &["--method", "full"])), 2e-5);
}

#[test]
fn a_faulty_file_is_reported_with_its_name_and_key() {
    for (text, expected) in [
        ("batchsize = 3", "tune.toml: key `batchsize`: tune has no such setting; a similar one is `batch-size`"),
        ("settings = 'a.toml'", "tune.toml: key `settings`: tune has no such setting"),
        (
            "batch_size = 0",
            "tune.toml: key `batch_size`: invalid value '0' for '--batch-size <BATCH_SIZE>': expected 1",
        ),
        ("seed = -1", "tune.toml: key `seed`: invalid value '-1' for '--seed"),
        ("beta2 = 1.0", "expected a number from 0 to below 1"),
        (
            "method = 'laura'",
            "key `method`: invalid value 'laura' for '--method <METHOD>': unknown method \"laura\"; known methods are full, probing,",
        ),
        ("quiet = 1", "key `quiet`: expected true or false, found `1`"),
        ("output = ['a', 'b']", "key `output`: expected a single value, found a list"),
        ("[training]\nseed = 1", "key `training`: tune has no such setting"),
        ("seed = 1\nseed = 2", "tune.toml: line 2: not valid TOML: duplicate key"),
    ] {
        let found = sentence(with_file(text, &NEEDED));
        assert!(found.contains(expected), "{text}: {found}");
    }
    let missing = sentence(tune(&["--settings", "no/such.toml"]));
    assert!(missing.starts_with("no/such.toml: "), "{missing}");
}

#[test]
fn a_faulty_command_line_keeps_claps_own_error_and_exit_code() {
    let kind = |arguments: &[&str]| {
        let arguments = std::iter::once(&"tune").chain(arguments).map(OsString::from).collect();
        let error = resolve::<Tune>(arguments).unwrap().err().unwrap();
        (error.kind(), error.exit_code())
    };
    assert_eq!(kind(&["--help"]), (ErrorKind::DisplayHelp, 0));
    assert_eq!(kind(&[]), (ErrorKind::MissingRequiredArgument, 2));
    assert_eq!(kind(&["--no-such-flag"]), (ErrorKind::UnknownArgument, 2));
    assert_eq!(kind(&["--epsilon", "minus"]), (ErrorKind::ValueValidation, 2));
}

#[test]
fn the_printed_command_names_what_differs_from_the_defaults_and_gives_the_same_settings() {
    let settings = tune(&["b c.parquet", "--method", "lora", "--seed", "0", "--beta2", "0.99", "--quiet"]).unwrap();
    let command = command_line(&settings).unwrap();
    assert_eq!(
        command,
        "tune --output out --quiet --model base --method lora --beta2 0.99 --data a.parquet --data 'b c.parquet'"
    );
    let words = ["--quiet", "--method", "lora", "--beta2", "0.99", "--data", "b c.parquet"];
    assert_eq!(tune(&words).unwrap(), settings);
}

#[test]
fn methods_stand_on_top_of_each_other_each_with_its_learning_rate() {
    let stack = tune(&["--method", "lora+prompt-tuning"]).unwrap().training;
    assert_eq!((stack.method.list(), stack.learning_rate(1e-5)), (&[Method::Lora, Method::PromptTuning][..], 1e-4));
    assert_eq!(stack.method.learning_rate_scale(Method::PromptTuning), 30.0);
    for (method, reason) in [("lora+lora", "lora is given twice"), ("full+lora", "full trains every weight")] {
        assert!(sentence(tune(&["--method", method])).contains(reason));
    }
}

#[test]
fn patterns_are_names_with_numbers() {
    let lora =
        tune(&["--method", "lora", "--rank-pattern", "q_proj=4,layers.0.*k_proj=2"]).unwrap().training.methods.lora;
    let expected = [("q_proj", 4.0), ("layers.0.*k_proj", 2.0)];
    assert_eq!(lora.rank_pattern, expected.map(|(name, number)| Pattern { name: name.to_string(), number }));
    assert!(sentence(tune(&["--alpha-pattern", "q_proj"])).contains("expected name=number"));
}
