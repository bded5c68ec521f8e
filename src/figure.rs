//! Figures: panels of lines and points with named axes, as SVG that is readable in black and white.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::ShapeStyle;

use crate::error::{Error, Result};
use crate::files::write_atomically;

/// One or more panels under a title.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Figure {
    /// What it shows.
    pub title: String,
    /// Its parts, two beside each other.
    pub panels: Vec<Panel>,
}

/// Axes with curves.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Panel {
    /// What the horizontal axis is, with its unit.
    pub x: String,
    /// What the vertical axis is, with its unit.
    pub y: String,
    /// The curves.
    pub series: Vec<Series>,
    /// Whether both axes go from 1/2 to 1 and a line shows where they are equal.
    pub is_calibration: bool,
}

/// One curve.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Series {
    /// Its name in the legend.
    pub name: String,
    /// Its points, from left to right.
    pub points: Vec<(f64, f64)>,
}

/// Width and height of a panel, in pixels.
const PANEL: (u32, u32) = (460, 320);
const TITLE: u32 = 40;
const INK: RGBColor = RGBColor(40, 40, 40);
/// Of different lightness, so that they differ in print too; the markers differ beside.
const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 0, 0),
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(130, 130, 130),
];

impl Figure {
    /// Draws it into a file.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        let svg = self.svg().map_err(|error| Error::input(format!("{}: {error}", path.as_ref().display())))?;
        write_atomically(path, |file| std::io::Write::write_all(file, svg.as_bytes()))
    }

    /// The figure as SVG.
    pub fn svg(&self) -> Result<String, String> {
        let columns = self.panels.len().clamp(1, 2);
        let rows = self.panels.len().div_ceil(columns).max(1);
        let size = (PANEL.0 * columns as u32, PANEL.1 * rows as u32 + TITLE);
        let mut svg = String::new();
        {
            let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
            let draw = || -> Result<(), Box<dyn std::error::Error>> {
                root.fill(&WHITE)?;
                let titled = root.titled(&self.title, ("sans-serif", 18).into_font().color(&INK))?;
                for (panel, area) in self.panels.iter().zip(titled.split_evenly((rows, columns))) {
                    panel.draw(&area)?;
                }
                root.present()?;
                Ok(())
            };
            draw().map_err(|error| format!("the figure cannot be drawn: {error}"))?;
        }
        Ok(svg)
    }
}

impl Panel {
    fn draw<'a>(&self, area: &DrawingArea<SVGBackend<'a>, Shift>) -> Result<(), Box<dyn std::error::Error>> {
        let (x, y) = if self.is_calibration {
            (0.5..1.0, 0.0..1.0)
        } else {
            (self.range(|point| point.0), self.range(|point| point.1))
        };
        let mut chart = ChartBuilder::on(area)
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d(x.clone(), y)?;
        chart
            .configure_mesh()
            .x_desc(&self.x)
            .y_desc(&self.y)
            .axis_style(INK)
            .light_line_style(WHITE)
            .bold_line_style(RGBColor(225, 225, 225))
            .label_style(("sans-serif", 12).into_font().color(&INK))
            .x_labels(6)
            .y_labels(6)
            .draw()?;
        if self.is_calibration {
            let line = ShapeStyle { color: INK.mix(0.5), filled: false, stroke_width: 1 };
            chart.draw_series(LineSeries::new([(x.start, x.start), (x.end, x.end)], line))?;
        }
        for (index, series) in self.series.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let points: Vec<(f64, f64)> =
                series.points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect();
            chart.draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?;
            // Few enough markers that they can be told apart.
            let every = points.len().div_ceil(12).max(1);
            let marked = points.iter().skip(every / 2).step_by(every).copied();
            let drawn = chart.draw_series(marked.map(|at| EmptyElement::at(at) + marker(index, (0, 0), colour)))?;
            if self.series.len() > 1 {
                drawn
                    .label(&series.name)
                    .legend(move |(x, y)| EmptyElement::at((x, y)) + marker(index, (10, 0), colour));
            }
        }
        if self.series.len() > 1 {
            chart
                .configure_series_labels()
                .background_style(WHITE.mix(0.85))
                .border_style(RGBColor(200, 200, 200))
                .label_font(("sans-serif", 12).into_font().color(&INK))
                .draw()?;
        }
        Ok(())
    }

    /// From the least to the greatest number, with a little room around.
    fn range(&self, of: fn(&(f64, f64)) -> f64) -> std::ops::Range<f64> {
        let numbers = || self.series.iter().flat_map(|series| &series.points).map(of).filter(|x| x.is_finite());
        let (least, greatest) = (numbers().fold(f64::INFINITY, f64::min), numbers().fold(f64::NEG_INFINITY, f64::max));
        if least > greatest {
            return 0.0..1.0;
        }
        let room = if greatest > least { 0.05 * (greatest - least) } else { 0.5 * greatest.abs().max(1.0) };
        least - room..greatest + room
    }
}

/// The marker of a curve: circle, triangle, cross or square, filled or not.
fn marker<'a>(index: usize, at: (i32, i32), colour: RGBColor) -> DynElement<'static, SVGBackend<'a>, (i32, i32)> {
    let style = if (index / 4).is_multiple_of(2) { colour.filled() } else { colour.stroke_width(1) };
    match index % 4 {
        0 => Circle::new(at, 4, style).into_dyn(),
        1 => TriangleMarker::new(at, 5, style).into_dyn(),
        2 => Cross::new(at, 4, colour.stroke_width(2)).into_dyn(),
        _ => Rectangle::new([(at.0 - 4, at.1 - 4), (at.0 + 4, at.1 + 4)], style).into_dyn(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_names_its_axes_and_curves_and_leaves_out_what_is_no_number() {
        let series = |name: &str| Series { name: name.into(), points: vec![(0.0, 1.0), (1.0, f64::NAN), (2.0, 3.0)] };
        let panel = Panel {
            x: "update".into(),
            y: "reward".into(),
            series: vec![series("one"), series("two")],
            is_calibration: false,
        };
        let empty = Panel { x: "nothing".into(), ..Default::default() };
        let svg = Figure { title: "A title".into(), panels: vec![panel, empty] }.svg().unwrap();
        assert!(
            ["A title", "update", "reward", "one", "two", "nothing"].iter().all(|text| svg.contains(text)),
            "{svg}"
        );
        assert!(svg.starts_with("<svg") && !svg.contains("NaN"));
    }
}
