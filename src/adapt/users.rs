//! Adapters of several users on one base: each row of the data runs with its own.

use super::{Bases, Role};
use crate::bail;
use crate::data::schema;
use crate::data::splits::Pattern;
use crate::error::Result;
use crate::model::Model;
use crate::settings::{NamedFolder, UserSettings};

impl Bases {
    /// Reads a model with the adapters of several users on top of it: stack 0 is the model's own, stack `i + 1` has that of `users[i]` too.
    pub fn load_with_users(&mut self, role: &Role, users: &[NamedFolder]) -> Result<Model> {
        let own = self.load(role)?;
        let with = |user: &NamedFolder| {
            let adapters: Vec<_> = role.adapters.iter().chain([&user.folder]).cloned().collect();
            self.load(&Role { adapters: &adapters, ..*role })
        };
        let others = users.iter().map(with).collect::<Result<Vec<_>>>()?;
        own.with_stacks_of(&others)
    }
}

/// For each row of the data the stack that it runs with, as its column of adapters says; 0 for every row where there are no adapters.
pub fn stacks_of_rows<'p>(users: &UserSettings, data: impl Into<Pattern<'p>>) -> Result<Vec<usize>> {
    let data = data.into();
    let mut seen = std::collections::HashSet::new();
    if let Some(twice) = users.adapters.iter().find(|user| !seen.insert(&user.name)) {
        bail!("--adapters {twice}: the name \"{}\" is given twice; give each adapter a name of its own", twice.name);
    }
    let names = match users.adapters.is_empty() {
        true => return Ok(vec![0; crate::data::table::TableRows::open(data)?.rows()]),
        false => schema::names(data, &users.adapter_column)?,
    };
    let stack = |(name, origin): (Option<String>, schema::Origin)| match name.filter(|name| !name.is_empty()) {
        None => Ok(0),
        Some(name) => match users.adapters.iter().position(|user| user.name == name) {
            Some(index) => Ok(index + 1),
            None => {
                let known: Vec<&str> = users.adapters.iter().map(|user| user.name.as_str()).collect();
                bail!(
                    "{origin}, column `{}`: no adapter is called \"{name}\"; --adapters has {}",
                    users.adapter_column,
                    known.join(", ")
                )
            }
        },
    };
    names.into_iter().map(stack).collect()
}
