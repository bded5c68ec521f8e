//! A program of the user's that judges answers.
//!
//! It is started once, with a shell. For each answer it reads a line, `{"prompt": ..., "response": ..., "ended": ..., "columns": {...}}` (a prompt of
//! several turns is a list of `{"role", "content"}`; `columns` holds the row's other columns), and writes a line: a number, or an object with a
//! number called `reward`. Asked by group, it reads a line for each prompt, with lists `responses` and `ended`, and writes a line with a list of
//! numbers, or an object with such a list called `rewards`.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::{Asked, Reply};
use crate::bail;
use crate::data::schema::{Prompt, Text};
use crate::error::{Error, Result};

/// A running reward command.
pub struct RewardCommand {
    /// The flag and the command, as errors name them.
    name: String,
    child: Child,
    /// What is to be written to it; a thread of its own writes, so that neither waits for the other.
    questions: Option<Sender<String>>,
    /// The lines that it writes.
    lines: Receiver<String>,
    /// The last lines of its standard error stream.
    complaints: Arc<Mutex<VecDeque<String>>>,
    /// Whether it is asked for all answers to a prompt at once.
    by_group: bool,
    /// The longest that it may take for an answer.
    limit: Duration,
}

/// How long a surplus line is waited for.
const SURPLUS: Duration = Duration::from_millis(20);
/// Lines of the standard error stream that an error repeats.
const COMPLAINTS: usize = 3;

impl RewardCommand {
    /// Starts the command with `sh`; `flag` is where it was given.
    pub fn start(flag: &str, command: &str, by_group: bool, limit: Duration) -> Result<Self> {
        let name = format!("{flag} `{command}`");
        let mut shell = Command::new("sh");
        shell.args(["-c", command]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // A group of its own, so that what the shell starts can be ended with it.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut shell, 0);
        let mut child = shell.spawn().map_err(|error| Error::input(format!("{name} cannot be started: {error}")))?;
        let (questions, to_write) = channel();
        let (to_read, lines) = channel();
        let complaints = Arc::new(Mutex::new(VecDeque::new()));
        if let (Some(stdin), Some(stdout), Some(stderr)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        {
            thread::spawn(move || write_lines(stdin, &to_write));
            thread::spawn(move || read_lines(stdout, &to_read));
            let complaints = complaints.clone();
            thread::spawn(move || read_complaints(stderr, &complaints));
        }
        Ok(RewardCommand { name, child, questions: Some(questions), lines, complaints, by_group, limit })
    }

    /// The reward of every answer of every prompt.
    pub fn score(&mut self, asked: &[Asked]) -> Result<Vec<Vec<f32>>> {
        self.refuse_surplus(Duration::ZERO)?;
        for question in asked.iter().flat_map(|asked| self.questions_about(asked)) {
            // A command that has ended reads nothing, which is noticed when it writes nothing.
            let _ = self.questions.as_ref().map(|questions| questions.send(question));
        }
        let mut rewards = Vec::with_capacity(asked.len());
        for asked in asked {
            rewards.push(if self.by_group {
                self.group_answer(asked)?
            } else {
                asked.replies.iter().map(|reply| self.answer(asked.prompt, reply)).collect::<Result<_>>()?
            });
        }
        // A program that writes more than a line for a line has most likely done so by now, and then these numbers are not those of these answers.
        self.refuse_surplus(SURPLUS)?;
        Ok(rewards)
    }

    /// Refuses a line that nothing asked for: every later number would belong to another answer.
    fn refuse_surplus(&mut self, within: Duration) -> Result<()> {
        if let Ok(line) = self.lines.recv_timeout(within) {
            bail!(
                "{}: wrote {:?} when it was asked nothing; expected one line for each line that it reads{}",
                self.name,
                shortened(&line),
                self.last_words()
            );
        }
        Ok(())
    }

    /// The lines that it reads for a prompt.
    fn questions_about(&self, asked: &Asked) -> Vec<String> {
        match self.by_group {
            true => vec![group_question(asked)],
            false => asked.replies.iter().map(|reply| question(asked.prompt, reply)).collect(),
        }
    }

    /// The next number that the command writes, which belongs to this answer.
    fn answer(&mut self, prompt: &Prompt, reply: &Reply) -> Result<f32> {
        let asked = format!("the answer {:?} to {}", shortened(&reply.text), prompt.origin);
        let line = self.line(&asked, self.limit)?;
        match number(&line) {
            Some(reward) => Ok(reward),
            None => bail!(
                "{}: wrote {:?} for {asked}; expected a finite number, or {{\"reward\": number}}, on a line of its own{}",
                self.name,
                shortened(&line),
                self.last_words()
            ),
        }
    }

    /// The next list that the command writes, which belongs to the answers to this prompt.
    fn group_answer(&mut self, asked: &Asked) -> Result<Vec<f32>> {
        let (count, about) = (asked.replies.len(), format!("the answers to {}", asked.prompt.origin));
        let limit = self.limit.checked_mul(count.max(1) as u32).unwrap_or(Duration::MAX);
        let line = self.line(&about, limit)?;
        match numbers(&line) {
            Some(rewards) if rewards.len() == count => Ok(rewards),
            _ => bail!(
                "{}: wrote {:?} for {about}; expected a list of {count} finite numbers, or {{\"rewards\": list}}, on one line{}",
                self.name,
                shortened(&line),
                self.last_words()
            ),
        }
    }

    /// The next line that the command writes, which belongs to what was asked.
    fn line(&mut self, asked: &str, limit: Duration) -> Result<String> {
        match self.lines.recv_timeout(limit) {
            Ok(line) => Ok(line),
            Err(RecvTimeoutError::Timeout) => bail!(
                "{}: gave no number within {} seconds for {asked}; it has to write a line for each line that it reads, at once \
                 (flush its output), or needs a longer --reward-timeout{}",
                self.name,
                limit.as_secs_f64(),
                self.last_words()
            ),
            Err(RecvTimeoutError::Disconnected) => {
                let status = self.status();
                bail!("{}: ended ({status}) without a number for {asked}{}", self.name, self.last_words())
            }
        }
    }

    /// How the command ended, which its output's end announces.
    fn status(&mut self) -> String {
        let until = Instant::now() + Duration::from_secs(1);
        while Instant::now() < until {
            match self.child.try_wait() {
                Ok(Some(status)) => return status.to_string(),
                Ok(None) => thread::sleep(Duration::from_millis(10)),
                Err(error) => return error.to_string(),
            }
        }
        "it closed its output".to_string()
    }

    fn last_words(&self) -> String {
        // What it wrote last may still be on its way.
        thread::sleep(Duration::from_millis(50));
        match self.complaints.lock() {
            Ok(lines) if !lines.is_empty() => {
                format!("; its last words: {}", lines.iter().map(String::as_str).collect::<Vec<_>>().join(" | "))
            }
            _ => String::new(),
        }
    }
}

impl Drop for RewardCommand {
    fn drop(&mut self) {
        // The end of its input tells it to end; if it does not, it is ended.
        self.questions = None;
        let until = Instant::now() + Duration::from_secs(1);
        while Instant::now() < until {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
        #[cfg(unix)]
        let _ =
            Command::new("kill").args(["-KILL", "--", &format!("-{}", self.child.id())]).stderr(Stdio::null()).status();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn write_lines(mut stdin: ChildStdin, questions: &Receiver<String>) {
    for question in questions {
        if stdin.write_all(question.as_bytes()).and_then(|()| stdin.flush()).is_err() {
            return;
        }
    }
}

fn read_lines(stdout: ChildStdout, lines: &Sender<String>) {
    let mut reader = BufReader::new(stdout);
    let mut line = Vec::new();
    while matches!(reader.read_until(b'\n', &mut line), Ok(read) if read > 0) {
        if lines.send(String::from_utf8_lossy(&line).trim().to_string()).is_err() {
            return;
        }
        line.clear();
    }
}

fn read_complaints(stderr: ChildStderr, complaints: &Mutex<VecDeque<String>>) {
    for line in BufReader::new(stderr).split(b'\n').map_while(std::io::Result::ok) {
        let Ok(mut lines) = complaints.lock() else { return };
        if lines.len() == COMPLAINTS {
            lines.pop_front();
        }
        lines.push_back(shortened(String::from_utf8_lossy(&line).trim()).to_string());
    }
}

/// The line that the command reads for an answer.
fn question(prompt: &Prompt, reply: &Reply) -> String {
    with_columns(json!({ "response": reply.text, "ended": reply.ended }), prompt)
}

/// The line that the command reads for all answers to a prompt.
fn group_question(asked: &Asked) -> String {
    let responses: Vec<&str> = asked.replies.iter().map(|reply| reply.text.as_str()).collect();
    let ended: Vec<bool> = asked.replies.iter().map(|reply| reply.ended).collect();
    with_columns(json!({ "responses": responses, "ended": ended }), asked.prompt)
}

/// What is asked, with the prompt before it and the tools and other columns of its row behind it.
fn with_columns(answers: Value, prompt: &Prompt) -> String {
    let (text, tools) = match &prompt.prompt {
        Text::Plain(text) => (json!(text), None),
        Text::Messages(conversation) => {
            (conversation.iter().map(|message| json!(message.fields())).collect(), conversation.inputs.tools.as_ref())
        }
    };
    let mut question = Map::from_iter([("prompt".to_string(), text)]);
    if let Value::Object(answers) = answers {
        question.extend(answers);
    }
    tools.map(|tools| question.insert("tools".into(), tools.clone()));
    if !prompt.columns.is_empty() {
        question.insert("columns".into(), Value::Object(prompt.columns.clone()));
    }
    format!("{}\n", Value::Object(question))
}

/// The finite number that a line holds.
fn number(line: &str) -> Option<f32> {
    let value: Value = serde_json::from_str(line).ok()?;
    finite(&value).or_else(|| finite(value.get("reward")?))
}

/// The finite numbers that a line holds.
fn numbers(line: &str) -> Option<Vec<f32>> {
    let value: Value = serde_json::from_str(line).ok()?;
    value.as_array().or_else(|| value.get("rewards")?.as_array())?.iter().map(finite).collect()
}

fn finite(value: &Value) -> Option<f32> {
    value.as_f64().map(|number| number as f32).filter(|number| number.is_finite())
}

fn shortened(text: &str) -> &str {
    text.char_indices().nth(200).map_or(text, |(end, _)| &text[..end])
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::data::schema::{Message, Origin};

    fn prompt(text: Text) -> Prompt {
        let columns = [("answer".to_string(), json!(42))].into_iter().collect();
        Prompt { prompt: text, columns, origin: Origin { file: Arc::from(Path::new("prompts.parquet")), row: 3 } }
    }

    fn score(command: &str, replies: &[&str]) -> Result<Vec<Vec<f32>>> {
        score_by(false, command, replies)
    }

    fn score_by(by_group: bool, command: &str, replies: &[&str]) -> Result<Vec<Vec<f32>>> {
        let prompt = prompt(Text::Plain("Say \"so\".\n".into()));
        let replies: Vec<Reply> = replies.iter().map(|text| Reply { text: (*text).to_string(), ended: true }).collect();
        let mut command = RewardCommand::start("--reward-command", command, by_group, Duration::from_millis(600))?;
        command.score(&[Asked { prompt: &prompt, tree: None, replies: &replies }])
    }

    #[test]
    fn a_group_is_one_line_and_one_list() {
        let both = "while read -r line; do echo '[1, 2]'; done";
        assert_eq!(score_by(true, both, &["a", "b"]).unwrap(), [[1.0, 2.0]]);
        let object = r#"while read -r line; do echo '{"rewards": [1]}'; done"#;
        assert_eq!(score_by(true, object, &["a"]).unwrap(), [[1.0]]);
        for line in ["[1]", "[1, 2, 3]", "[1, \"b\"]", "[1, 1e999]", "1", "{\"reward\": [1, 2]}"] {
            let error = score_by(true, &format!("while read -r _; do echo '{line}'; done"), &["a", "b"]).unwrap_err();
            let error = error.to_string();
            assert!(
                error.contains("a list of 2 finite numbers") && error.contains("prompts.parquet: row 3"),
                "{error}"
            );
        }
        let prompt = prompt(Text::Plain("Hi".into()));
        let replies = [Reply { text: "a".into(), ended: true }, Reply { text: "b".into(), ended: false }];
        let line = group_question(&Asked { prompt: &prompt, tree: None, replies: &replies });
        let expected =
            "{\"prompt\":\"Hi\",\"responses\":[\"a\",\"b\"],\"ended\":[true,false],\"columns\":{\"answer\":42}}\n";
        assert_eq!(line, expected);
    }

    #[test]
    fn one_number_a_line_in_either_form() {
        assert_eq!(score("while read -r line; do echo 0.5; done", &["a", "b"]).unwrap(), [[0.5, 0.5]]);
        let object = r#"while read -r line; do echo '{"reward": -2}'; done"#;
        assert_eq!(score(object, &["a"]).unwrap(), [[-2.0]]);
        // More than a pipe holds, in both directions.
        let long = "x".repeat(3000);
        let many = vec![long.as_str(); 100];
        assert_eq!(score("while read -r line; do echo ${#line}; done", &many).unwrap()[0].len(), 100);
    }

    #[test]
    fn the_command_reads_prompt_and_answer() {
        let messages = prompt(Text::messages(vec![Message::user("Hi")]));
        let reply = Reply { text: "Ho\n".into(), ended: false };
        let line = question(&messages, &reply);
        assert_eq!(
            line,
            "{\"prompt\":[{\"role\":\"user\",\"content\":\"Hi\"}],\"response\":\"Ho\\n\",\"ended\":false,\"columns\":{\"answer\":42}}\n"
        );
    }

    #[test]
    fn every_failure_names_the_command_and_is_no_number() {
        for (command, reason) in [
            ("sleep 30", "gave no number within 0.6 seconds for the answer \"b\" to prompts.parquet: row 3"),
            ("cat > /dev/null; sleep 30", "gave no number within"),
            ("read -r line; echo cannot >&2; exit 3", "ended (exit status: 3) without a number"),
            ("read -r line; echo cannot >&2; exit 3", "its last words: cannot"),
            ("no-such-program-here", "ended (exit status: 127)"),
            ("while read -r line; do echo good; done", "wrote \"good\""),
            ("while read -r line; do echo NaN; done", "wrote \"NaN\""),
            ("while read -r line; do echo 1e999; done", "wrote \"1e999\""),
            ("while read -r line; do echo; done", "wrote \"\""),
        ] {
            let error = score(command, &["b", "c"]).unwrap_err().to_string();
            assert!(error.contains(reason) && error.contains(&format!("`{command}`")), "{error}");
        }
    }

    #[test]
    fn a_command_that_writes_more_than_it_is_asked_is_noticed() {
        let chatty = "while read -r line; do echo 1; echo 2; done";
        let mut command = RewardCommand::start("--judge-command", chatty, false, Duration::from_secs(5)).unwrap();
        let (prompt, replies) = (prompt(Text::Plain("a".into())), [Reply { text: "b".into(), ended: true }]);
        let asked = [Asked { prompt: &prompt, tree: None, replies: &replies }];
        // At once, or, where the machine is busy, the next time.
        let error = command.score(&asked).and_then(|_| {
            thread::sleep(Duration::from_millis(100));
            command.score(&asked)
        });
        let error = error.unwrap_err().to_string();
        assert!(error.contains("when it was asked nothing") && error.starts_with("--judge-command `while"), "{error}");
    }

    #[test]
    fn a_command_that_gives_too_few_numbers_is_noticed() {
        assert!(score("read -r line; echo 1", &["b"]).is_ok());
        assert!(score("read -r line; echo 1", &["b", "c"]).unwrap_err().to_string().contains("the answer \"c\""));
    }
}
