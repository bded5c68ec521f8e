//! The splits that a data set's `README.md` declares in its YAML: `configs`, each with `data_files` (Hugging Face `datasets`).
//!
//! Of YAML as much is read as such files use: mappings and lists by their indentation, lists in brackets, and quoted or plain scalars.

/// Splits with the patterns of their files.
pub(super) type SplitPatterns = Vec<(String, Vec<String>)>;

/// A configuration as it is declared.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Declared {
    pub(super) name: String,
    pub(super) is_default: bool,
    /// The splits with the patterns of their files.
    pub(super) splits: Option<SplitPatterns>,
    /// The folder in which its files are.
    pub(super) folder: Option<String>,
}

/// All configurations that are declared, in their order.
pub(super) fn configurations(readme: &str) -> Vec<Declared> {
    let Some(Yaml::List(configs)) = front_matter(readme).and_then(|lines| Yaml::read(&lines)?.get("configs")) else {
        return Vec::new();
    };
    let declared = |config: &Yaml| {
        let scalar = |name: &str| config.get(name).and_then(Yaml::scalar);
        let name = scalar("config_name").unwrap_or_else(|| "default".to_owned());
        let is_default = scalar("default").is_some_and(|text| text == "true") || name == "default";
        let splits = config.get("data_files").and_then(splits).filter(|splits| !splits.is_empty());
        Declared { name, is_default, splits, folder: scalar("data_dir") }
    };
    configs.iter().map(declared).collect()
}

/// Whether a file, by its path in the folder, is one of a pattern: `*` stands for anything but `/`, `**` for any folders.
pub(super) fn matches(pattern: &str, file: &str) -> bool {
    let options = glob::MatchOptions { require_literal_separator: true, ..glob::MatchOptions::default() };
    let pattern = pattern.trim_start_matches("./");
    glob::Pattern::new(pattern).is_ok_and(|pattern| pattern.matches_with(file, options))
        || file.strip_prefix(pattern.trim_end_matches('/')).is_some_and(|rest| rest.starts_with('/'))
}

fn splits(data_files: Yaml) -> Option<SplitPatterns> {
    let paths = |paths: Yaml| match paths {
        Yaml::Scalar(path) => Some(vec![path]),
        Yaml::List(paths) => paths.into_iter().map(Yaml::scalar).collect::<Option<Vec<_>>>(),
        Yaml::Map(_) => None,
    };
    match data_files {
        Yaml::Map(splits) => splits.into_iter().map(|(name, files)| Some((name, paths(files)?))).collect(),
        Yaml::List(splits) if splits.iter().all(|split| matches!(split, Yaml::Map(_))) => {
            let split = |split: Yaml| Some((split.get("split")?.scalar()?, paths(split.get("path")?)?));
            splits.into_iter().map(split).collect()
        }
        all => Some(vec![("train".to_owned(), paths(all)?)]),
    }
}

/// The lines between the first two lines of `---`.
fn front_matter(readme: &str) -> Option<Vec<(usize, &str)>> {
    let mut lines = readme.lines();
    if lines.next()?.trim_end() != "---" {
        return None;
    }
    let lines = lines.take_while(|line| line.trim_end() != "---");
    let is_text = |line: &&str| !line.trim().is_empty() && !line.trim_start().starts_with('#');
    Some(lines.filter(is_text).map(|line| (line.len() - line.trim_start().len(), line.trim())).collect())
}

#[derive(Debug, Clone, PartialEq)]
enum Yaml {
    Scalar(String),
    List(Vec<Yaml>),
    Map(Vec<(String, Yaml)>),
}

impl Yaml {
    /// How deep values may be in others.
    const DEPTH: usize = 16;

    fn read(lines: &[(usize, &str)]) -> Option<Self> {
        let mut rest = lines;
        Self::block(&mut rest, 0)
    }

    fn get(&self, name: &str) -> Option<Yaml> {
        match self {
            Yaml::Map(pairs) => pairs.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone()),
            _ => None,
        }
    }

    fn scalar(self) -> Option<String> {
        match self {
            Yaml::Scalar(text) => Some(text),
            _ => None,
        }
    }

    /// The list or mapping whose lines are indented as the first of `rest`, which is left with the lines behind it.
    fn block(rest: &mut &[(usize, &str)], depth: usize) -> Option<Self> {
        let &(indent, first) = rest.first().filter(|_| depth < Self::DEPTH)?;
        let is_list = is_item(first);
        let (mut items, mut pairs) = (Vec::new(), Vec::new());
        while let Some(&(at, line)) = rest.first().filter(|(at, line)| *at == indent && is_item(line) == is_list) {
            *rest = &rest[1..];
            match line.strip_prefix('-').filter(|_| is_list) {
                Some(item) => {
                    let inner = item.trim_start();
                    items.push(match key_and_value(inner) {
                        // The mapping goes on below, as if the dash were a space.
                        Some(_) => {
                            let inner_indent = at + line.len() - inner.len();
                            let end = rest.iter().position(|(other, _)| *other <= at).unwrap_or(rest.len());
                            let own: Vec<(usize, &str)> =
                                std::iter::once((inner_indent, inner)).chain(rest[..end].iter().copied()).collect();
                            *rest = &rest[end..];
                            Self::block(&mut &own[..], depth + 1)?
                        }
                        None => flow(inner),
                    });
                }
                None => {
                    let (key, value) = key_and_value(line)?;
                    let is_below =
                        |(other, line): &&(usize, &str)| *other > indent || *other == indent && is_item(line);
                    let value = match (value.is_empty(), rest.first().filter(is_below)) {
                        (true, Some(_)) => Self::block(rest, depth + 1)?,
                        _ => flow(value),
                    };
                    pairs.push((unquoted(key), value));
                }
            }
            // Lines that belong to a value of another form, as the rest of a long text.
            let end = rest.iter().position(|(other, _)| *other <= indent).unwrap_or(rest.len());
            *rest = &rest[end..];
        }
        Some(if is_list { Yaml::List(items) } else { Yaml::Map(pairs) })
    }
}

fn is_item(line: &str) -> bool {
    line == "-" || line.starts_with("- ")
}

/// `key: value`, where the value may be empty.
fn key_and_value(line: &str) -> Option<(&str, &str)> {
    if line.starts_with(['"', '\'', '[', '{']) && !line.contains(':') {
        return None;
    }
    match line.split_once(": ") {
        Some((key, value)) => Some((key.trim(), value.trim())),
        None => line.strip_suffix(':').map(|key| (key.trim(), "")),
    }
}

/// A scalar, or a list in brackets.
fn flow(text: &str) -> Yaml {
    match text.strip_prefix('[').and_then(|text| text.strip_suffix(']')) {
        Some(items) => Yaml::List(items.split(',').map(|item| Yaml::Scalar(unquoted(item.trim()))).collect()),
        None => Yaml::Scalar(unquoted(text)),
    }
}

fn unquoted(text: &str) -> String {
    let inner = |quote: char| text.strip_prefix(quote).and_then(|text| text.strip_suffix(quote));
    let plain = || text.split(" #").next().unwrap_or_default().trim_end();
    inner('"').or_else(|| inner('\'')).unwrap_or_else(plain).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(yaml: &str) -> Option<SplitPatterns> {
        configurations(&format!("---\n{yaml}---\ntext\n")).into_iter().next()?.splits
    }

    fn split(name: &str, paths: &[&str]) -> (String, Vec<String>) {
        (name.to_owned(), paths.iter().map(|path| path.to_string()).collect())
    }

    #[test]
    fn every_form_of_data_files_is_read() {
        let list = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n  - split: test\n    path:\n      - \"data/a.parquet\"\n      - data/b.parquet\ntags:\n- a\n";
        let expected = vec![split("train", &["data/train-*"]), split("test", &["data/a.parquet", "data/b.parquet"])];
        assert_eq!(read(list), Some(expected.clone()));
        let indented = "tags:\n  - x: y\nconfigs:\n  - config_name: main\n    data_files:\n      - split: train\n        path: data/train-*\n      - split: test\n        path: [data/a.parquet, 'data/b.parquet']\n    features: x\n";
        assert_eq!(read(indented), Some(expected));
        assert_eq!(
            read("configs:\n- config_name: default\n  data_files: \"*.parquet\"\n"),
            Some(vec![split("train", &["*.parquet"])])
        );
        assert_eq!(
            read("configs:\n- data_files:\n  - a.parquet\n  - b.parquet\n"),
            Some(vec![split("train", &["a.parquet", "b.parquet"])])
        );
        assert_eq!(
            read("configs:\n- config_name: default\n  data_files:\n    train: a.parquet\n"),
            Some(vec![split("train", &["a.parquet"])])
        );
    }

    #[test]
    fn the_default_configuration_is_known_by_its_name_or_by_a_mark() {
        let defaults = |second: &str| {
            let yaml =
                format!("configs:\n- config_name: a\n  data_files: a/*\n- config_name: {second}\n  data_files: b/*\n");
            let all = configurations(&format!("---\n{yaml}---\n"));
            all.iter().map(|one| one.is_default).collect::<Vec<_>>()
        };
        assert_eq!(defaults("default"), [false, true]);
        assert_eq!(defaults("b\n  default: true"), [false, true]);
        assert_eq!(defaults("b"), [false, false]);
    }

    #[test]
    fn other_texts_declare_nothing() {
        for text in [
            "license: mit\n",
            "configs: none\n",
            "configs:\n- config_name: a\n",
            "a: |\n  long\n   text\nb:\n",
            ": :\n- -\n",
        ] {
            assert_eq!(read(text), None, "{text}");
        }
        assert_eq!(configurations("# Title\n"), []);
    }

    #[test]
    fn stars_stand_for_names_and_double_stars_for_folders() {
        assert!(matches("data/train-*", "data/train-0.parquet") && !matches("data/*", "data/a/b.parquet"));
        assert!(
            matches("**/*.parquet", "a/b.parquet")
                && matches("data/**", "data/a/b.parquet")
                && matches("data", "data/a.parquet")
        );
        assert!(!matches("dat", "data/a.parquet"));
    }
}
