//! Folders with names, and adapters that single rows run with.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::flags::Flags;

/// A folder with a name, such as a model's in a report; written `name=folder`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NamedFolder {
    /// The name.
    pub name: String,
    /// The folder of a Hugging Face model or of a PEFT adapter.
    pub folder: PathBuf,
}

impl FromStr for NamedFolder {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((name, folder)) if !name.is_empty() && !folder.is_empty() => {
                Ok(NamedFolder { name: name.to_string(), folder: PathBuf::from(folder) })
            }
            _ => Err("expected name=folder, as in base=data/base".to_string()),
        }
    }
}

impl TryFrom<String> for NamedFolder {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for NamedFolder {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}={}", self.name, self.folder.display())
    }
}

impl From<NamedFolder> for String {
    fn from(model: NamedFolder) -> Self {
        model.to_string()
    }
}

/// Adapters of several users on one model: each row of the data runs with one of them.
#[derive(Debug, Clone, Default, PartialEq, Args, Serialize, Deserialize)]
pub struct UserSettings {
    /// Adapters by name, on top of the model; each row runs with the one that its --adapter-column names, or with none
    #[arg(long, value_name = "NAME=FOLDER", num_args = 1..)]
    #[serde(default)]
    pub adapters: Vec<NamedFolder>,
    /// The column that names each row's adapter; a null or an empty text stands for none
    #[arg(long, value_name = "COLUMN", default_value = "adapter")]
    pub adapter_column: String,
}

impl UserSettings {
    /// When they are read.
    pub fn flags() -> Flags<Self> {
        Flags::new()
            .always(&["adapters"])
            .only("with --adapters", &["adapter_column"], |users: &Self| !users.adapters.is_empty())
    }
}
