//! Facts: a person, a relation and a value, each said in one fixed sentence.

use rand::Rng;

use super::choose;
use super::names::Names;
use crate::random::Stream;

/// What kind of value a relation has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Value {
    Place,
    Person,
    Word(&'static [&'static str]),
}

/// A relation: how it is said and how it is asked for. `{}` is the person.
#[derive(Debug, PartialEq, Eq)]
pub struct Relation {
    /// Between person and value.
    said: &'static str,
    question: &'static str,
    value: Value,
}

const JOBS: &[&str] =
    &["baker", "miller", "teacher", "painter", "doctor", "farmer", "sailor", "tailor", "guard", "writer"];
const ANIMALS: &[&str] = &["hen", "goat", "dog", "cat", "horse", "duck", "sheep", "pig", "rabbit", "cow"];
const FOODS: &[&str] = &["bread", "soup", "cheese", "honey", "fish", "rice", "apples", "plums", "beans", "cake"];
const INSTRUMENTS: &[&str] = &["flute", "drum", "harp", "violin", "piano", "horn", "guitar", "trumpet"];
const DRINKS: &[&str] = &["tea", "milk", "water", "coffee", "juice", "cider"];
const VEHICLES: &[&str] = &["cart", "bus", "truck", "van", "tractor", "coach"];
const THINGS: &[&str] = &["hat", "boat", "lamp", "chair", "ring", "coat", "clock", "bag", "mirror", "kettle"];

/// All relations.
pub const RELATIONS: [Relation; 10] = [
    Relation { said: "lives in", question: "Where does {} live?", value: Value::Place },
    Relation { said: "was born in", question: "Where was {} born?", value: Value::Place },
    Relation { said: "works as a", question: "What does {} work as?", value: Value::Word(JOBS) },
    Relation { said: "keeps a", question: "What does {} keep?", value: Value::Word(ANIMALS) },
    Relation { said: "likes", question: "What does {} like?", value: Value::Word(FOODS) },
    Relation { said: "plays the", question: "What does {} play?", value: Value::Word(INSTRUMENTS) },
    Relation { said: "drinks", question: "What does {} drink?", value: Value::Word(DRINKS) },
    Relation { said: "drives a", question: "What does {} drive?", value: Value::Word(VEHICLES) },
    Relation { said: "owns a", question: "What does {} own?", value: Value::Word(THINGS) },
    Relation { said: "is married to", question: "Who is {} married to?", value: Value::Person },
];

/// Somebody, a relation, and what stands in it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Fact {
    /// The person.
    pub person: String,
    /// Index into [`RELATIONS`].
    pub relation: usize,
    /// The value.
    pub value: String,
}

impl Fact {
    /// A random value for this person and relation.
    pub fn random(person: &str, relation: usize, names: &Names, stream: &mut Stream) -> Self {
        let value = match RELATIONS[relation].value {
            Value::Place => names.place(stream),
            Value::Person => names.person(&[person], stream),
            Value::Word(words) => choose(words, stream).to_string(),
        };
        Fact { person: person.to_string(), relation, value }
    }

    /// The fact as a sentence.
    pub fn sentence(&self) -> String {
        format!("{} {} {}.", self.person, RELATIONS[self.relation].said, self.value)
    }

    /// The fact that a sentence of this form says, true or not; `None` for any other sentence.
    pub fn parse(sentence: &str) -> Option<Self> {
        let (person, rest) = sentence.strip_suffix('.')?.split_once(' ')?;
        let value_of = |said: &str| rest.strip_prefix(said)?.strip_prefix(' ');
        let (relation, value) =
            RELATIONS.iter().enumerate().find_map(|(index, relation)| Some((index, value_of(relation.said)?)))?;
        let is_word = |text: &str| !text.is_empty() && text.chars().all(char::is_alphabetic);
        let fact = Fact { person: person.to_string(), relation, value: value.to_string() };
        (is_word(person) && is_word(value)).then_some(fact)
    }

    /// The question that it answers.
    pub fn question(&self) -> String {
        question(&self.person, self.relation)
    }

    /// Whether the value is a name.
    pub fn value_is_name(&self) -> bool {
        matches!(RELATIONS[self.relation].value, Value::Place | Value::Person)
    }
}

/// The question for a person's relation.
pub fn question(person: &str, relation: usize) -> String {
    RELATIONS[relation].question.replace("{}", person)
}

/// A passage: facts about one person, or about two.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Passage {
    /// Its people.
    pub people: Vec<String>,
    /// Its facts, in order.
    pub facts: Vec<Fact>,
}

impl Passage {
    /// A passage of 3 to 5 facts about one person, or, one time in six, 2 or 3 about each of two.
    pub fn random(names: &Names, stream: &mut Stream) -> Self {
        let first = names.person(&[], stream);
        let mut people = vec![first.clone()];
        if stream.random_bool(1.0 / 6.0) {
            people.push(names.person(&[&first], stream));
        }
        let mut facts = Vec::new();
        for person in &people {
            let count = if people.len() == 1 { stream.random_range(3..=5) } else { stream.random_range(2..=3) };
            let mut relations: Vec<usize> = (0..RELATIONS.len()).collect();
            crate::random::shuffle(&mut relations, stream);
            facts.extend(relations[..count].iter().map(|&relation| Fact::random(person, relation, names, stream)));
        }
        if people.len() > 1 {
            crate::random::shuffle(&mut facts, stream);
        }
        Passage { people, facts }
    }

    /// The passage's text.
    pub fn text(&self) -> String {
        self.facts.iter().map(Fact::sentence).collect::<Vec<_>>().join(" ")
    }

    /// A relation of one of its people of which it does not speak.
    pub fn missing(&self, stream: &mut Stream) -> (String, usize) {
        let person = choose(&self.people, stream).clone();
        loop {
            let relation = stream.random_range(0..RELATIONS.len());
            if !self.facts.iter().any(|fact| fact.person == person && fact.relation == relation) {
                return (person, relation);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random;
    use crate::world::names::Split;

    #[test]
    fn every_fact_is_read_from_its_sentence_and_nothing_else_is() {
        let names = Names::of(Split::Test, 0);
        let mut stream = random::stream(0, "test", 0);
        for relation in 0..RELATIONS.len() {
            let fact = Fact::random("Vubek", relation, &names, &mut stream);
            assert_eq!(Fact::parse(&fact.sentence()), Some(fact));
        }
        for other in [
            "",
            "Vubek.",
            "Vubek keeps a.",
            "Vubek keeps a hen",
            "keeps a hen.",
            "Vubek keeps a red hen.",
            "Vubek eats soup.",
        ] {
            assert_eq!(Fact::parse(other), None, "{other}");
        }
    }
}
