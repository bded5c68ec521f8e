//! How answers end as a model reads them, in words for a plan.

use crate::model::head::Form;

/// How an encoder reads answers.
pub const AS_PAIR: &str = "as the second text of a pair, which an encoder reads";

/// How answers are read, with the end-of-text token or without.
pub fn how_read(with_eos: bool) -> &'static str {
    if with_eos { "with the end-of-text token where they ended by themselves" } else { "as they are" }
}

/// The same next to how the reward head was trained, where that is known.
pub fn how_read_and_trained(with_eos: bool, trained_so: Option<bool>) -> String {
    let trained = match trained_so {
        Some(trained_so) if trained_so == with_eos => ", as the reward head was trained",
        Some(true) => ", though the reward head was trained with the end-of-text token",
        Some(false) => ", though the reward head was trained without it",
        None => "; nothing says how the reward head was trained",
    };
    format!("{}{trained}", how_read(with_eos))
}

/// How a reward model with such a head reads answers. `as_is` is `--reward-as-is`.
pub fn of_reward_model(form: Option<&Form>, is_causal: bool, as_is: bool) -> String {
    if !is_causal {
        return AS_PAIR.to_owned();
    }
    let trained_so = form.and_then(|form| form.answers_end_with_eos);
    let advice = match (as_is, trained_so) {
        (false, Some(false) | None) => " (--reward-as-is leaves them as they are)",
        _ => "",
    };
    how_read_and_trained(!as_is, trained_so) + advice
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_from_training_is_said() {
        let with = "with the end-of-text token where they ended by themselves";
        assert_eq!(how_read_and_trained(true, Some(true)), format!("{with}, as the reward head was trained"));
        assert_eq!(
            how_read_and_trained(true, Some(false)),
            format!("{with}, though the reward head was trained without it")
        );
        assert_eq!(
            how_read_and_trained(false, Some(true)),
            "as they are, though the reward head was trained with the end-of-text token"
        );
        assert_eq!(how_read_and_trained(false, Some(false)), "as they are, as the reward head was trained");
        assert!(of_reward_model(None, true, false).ends_with("(--reward-as-is leaves them as they are)"));
        assert_eq!(of_reward_model(None, false, false), AS_PAIR);
    }
}
