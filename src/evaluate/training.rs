//! How the models came to be: the curves of the runs whose folders were given, and the reward model's calibration.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::section::Section;
use crate::figure::{Figure, Panel, Series};

/// Points of a curve, at most; a longer one is averaged over as many stretches.
const MOST_POINTS: usize = 100;
/// What `reward` draws.
const CALIBRATION: &str = "calibration.svg";

/// What is drawn of a run, in panels of one or two curves, where its metrics have it.
const PANELS: [(&str, &[(&str, &str)]); 6] = [
    ("loss", &[("loss", "training"), ("evaluation_loss", "held-out")]),
    (
        "accuracy on held-out pairs",
        &[("evaluation_accuracy", "reward model"), ("evaluation_accuracy_longer_wins", "longer answer wins")],
    ),
    ("score", &[("objective/scores", "score")]),
    ("KL from the reference, nats", &[("objective/kl", "KL")]),
    ("entropy, nats an answer", &[("objective/entropy", "entropy")]),
    ("length, tokens an answer", &[("val/response_length", "length")]),
];

/// A metric by name: its value at each step that has one.
type Curves = BTreeMap<String, Vec<(f64, f64)>>;

/// The curves of the runs among these folders, each once; none where no folder is a run's.
pub fn section(folders: &[(String, &Path)]) -> Option<Section> {
    let mut section =
        Section { key: "training", title: "How the models were trained".to_string(), ..Section::default() };
    let mut seen = Vec::new();
    for (name, folder) in folders {
        let Some(curves) = curves(folder).filter(|_| !seen.contains(folder)) else { continue };
        seen.push(folder);
        section.figures.push(figure(name, &curves));
        if let Ok(svg) = std::fs::read_to_string(folder.join(CALIBRATION)) {
            section.drawn.push((format!("{name}: predicted against observed win rate on held-out pairs"), svg));
        }
    }
    (!section.figures.is_empty()).then_some(section)
}

/// Reads a run's metrics. A folder without them, or with a line that is none, is no run's.
fn curves(folder: &Path) -> Option<Curves> {
    let text = std::fs::read_to_string(folder.join("metrics.jsonl")).ok()?;
    let mut curves = Curves::new();
    for line in text.lines() {
        let line: Value = serde_json::from_str(line).ok()?;
        let step = line.get("step")?.as_f64()?;
        for (name, value) in line.as_object()? {
            if let Some(value) = value.as_f64() {
                curves.entry(name.clone()).or_default().push((step, value));
            }
        }
    }
    Some(curves)
}

fn figure(name: &str, curves: &Curves) -> Figure {
    let is_ppo = curves.contains_key("objective/kl");
    let panel = |(y, series): &(&str, &[(&str, &str)])| {
        let found = series.iter().filter_map(|(metric, label)| {
            let points = averaged(curves.get(*metric)?);
            Some(Series { name: label.to_string(), points })
        });
        Panel { x: "step".to_string(), y: y.to_string(), series: found.collect(), is_calibration: false }
    };
    // PPO's loss says nothing that its score does not say better.
    let wanted = PANELS.iter().filter(|(y, _)| !(is_ppo && *y == "loss"));
    let mut panels: Vec<Panel> = wanted.map(panel).filter(|panel| !panel.series.is_empty()).collect();
    if let (Some(kl), Some(scores)) = (curves.get("objective/kl"), curves.get("objective/scores")) {
        let both = averaged(kl).into_iter().zip(averaged(scores));
        let mut points: Vec<(f64, f64)> = both.map(|((_, kl), (_, score))| (kl.max(0.0).sqrt(), score)).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        let series = vec![Series { name: "score".to_string(), points }];
        panels.push(Panel {
            x: "√KL from the reference, √nats".to_string(),
            y: "score".to_string(),
            series,
            is_calibration: false,
        });
    }
    Figure { title: format!("Training of {name}"), panels }
}

/// The means of at most [`MOST_POINTS`] stretches of a curve.
fn averaged(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let stretch = points.len().div_ceil(MOST_POINTS).max(1);
    let mean = |of: &[(f64, f64)]| {
        let (x, y) = of.iter().fold((0.0, 0.0), |sum, point| (sum.0 + point.0, sum.1 + point.1));
        (x / of.len() as f64, y / of.len() as f64)
    };
    points.chunks(stretch).map(mean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_runs_metrics_are_panels_and_other_folders_are_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let (run, other) = (folder.path().join("run"), folder.path().join("other"));
        for path in [&run, &other] {
            std::fs::create_dir_all(path).unwrap();
        }
        let lines = (1..=250).map(|step| format!("{{\"step\":{step},\"loss\":{},\"seconds\":1}}\n", 2 * step));
        let evaluation = "{\"step\":250,\"evaluation_loss\":3.5}\n".to_string();
        std::fs::write(run.join("metrics.jsonl"), lines.chain([evaluation]).collect::<String>()).unwrap();
        std::fs::write(run.join(CALIBRATION), "<svg></svg>").unwrap();
        let folders = [("sft".to_string(), &*run), ("again".to_string(), &*run), ("base".to_string(), &*other)];
        let section = section(&folders).unwrap();
        assert_eq!((section.figures.len(), section.drawn.len()), (1, 1));
        let [panel] = &section.figures[0].panels[..] else { panic!("{:?}", section.figures) };
        // 250 steps in stretches of three: the first has the mean of steps 1 to 3.
        assert_eq!((panel.series[0].points.len(), panel.series[0].points[0]), (84, (2.0, 4.0)));
        assert_eq!(panel.series[1].points, [(250.0, 3.5)]);
        assert!(super::section(&folders[2..]).is_none());
    }
}
