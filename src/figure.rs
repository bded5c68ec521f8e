//! Figures: panels of lines and points with named axes, as SVG that is readable in black and white.

use std::ops::{Range, RangeInclusive};
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::ShapeStyle;

use crate::error::{Error, Result};
use crate::files::write_atomically;
use crate::numbers::{largest, smallest};

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

/// Width and height of a panel, in pixels: about what a telephone shows without making its letters smaller.
const PANEL: (u32, u32) = (400, 310);
const TITLE: u32 = 40;
/// Height of a line of letters on the axes, in pixels; the letters' size is less by a quarter.
const LETTERS: i32 = 17;
/// What is left and below of the axes.
const BESIDE: u32 = 64;
const BELOW: u32 = 46;
const MARGIN: u32 = 12;
/// Of a panel's width, about what the legend takes.
const LEGEND_WIDTH: f64 = 0.65;
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

/// The lines of the curves, by dash and gap in pixels, so that they differ without colours.
const DASHES: [Option<(i32, i32)>; 4] = [None, Some((8, 5)), Some((2, 4)), Some((14, 4))];

impl Figure {
    /// Draws it into a file.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        let svg = self.svg().map_err(|error| Error::input(format!("{}: {error}", path.as_ref().display())))?;
        write_atomically(path, |file| std::io::Write::write_all(file, svg.as_bytes()))
    }

    /// Each panel as an SVG of its own without the title, with what it shows in words, for a page that puts them beside or below each other as there is room.
    pub fn panels(&self) -> Result<Vec<(String, String)>, String> {
        let alone = |panel: &Panel| Ok((panel.words(), drawn(PANEL, |root| panel.draw(root))?));
        self.panels.iter().map(alone).collect()
    }

    /// The figure as SVG.
    pub fn svg(&self) -> Result<String, String> {
        let columns = self.panels.len().clamp(1, 2);
        let rows = self.panels.len().div_ceil(columns).max(1);
        let size = (PANEL.0 * columns as u32, PANEL.1 * rows as u32 + TITLE);
        drawn(size, |root| {
            let titled = root.titled(&self.title, ("sans-serif", 18).into_font().color(&INK))?;
            let mut parts = self.panels.iter().zip(titled.split_evenly((rows, columns)));
            parts.try_for_each(|(panel, area)| panel.draw(&area))
        })
    }
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

/// What is drawn on white paper of this size, as SVG.
fn drawn(size: (u32, u32), draw: impl FnOnce(&Area) -> Drawn) -> Result<String, String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        let all = || -> Drawn {
            root.fill(&WHITE)?;
            draw(&root)?;
            Ok(root.present()?)
        };
        all().map_err(|error| format!("the figure cannot be drawn: {error}"))?;
    }
    Ok(svg)
}

impl Panel {
    fn draw(&self, area: &Area) -> Drawn {
        let (x, y) = if self.is_calibration {
            (0.5..1.0, 0.0..1.0)
        } else {
            (self.range(|point| point.0), self.range(|point| point.1))
        };
        let (across, along) = (PANEL.0 - BESIDE - MARGIN, PANEL.1 - BELOW);
        let mut chart = ChartBuilder::on(area)
            .margin(MARGIN)
            .x_label_area_size(BELOW)
            .y_label_area_size(BESIDE)
            .build_cartesian_2d(x.clone(), y.clone())?;
        chart
            .configure_mesh()
            .x_desc(fitting(&self.x, across))
            .y_desc(fitting(&self.y, along))
            .axis_style(INK)
            .light_line_style(WHITE)
            .bold_line_style(RGBColor(225, 225, 225))
            .label_style(("sans-serif", LETTERS).into_font().color(&INK))
            .x_label_formatter(&tick)
            .y_label_formatter(&tick)
            .x_labels(5)
            .y_labels(6)
            .draw()?;
        if self.is_calibration {
            let line = ShapeStyle { color: INK.mix(0.5), filled: false, stroke_width: 1 };
            chart.draw_series(LineSeries::new([(x.start, x.start), (x.end, x.end)], line))?;
        }
        for (index, series) in self.series.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let points = series.finite();
            let line = || points.iter().copied();
            match DASHES[index % DASHES.len()] {
                None => chart.draw_series(LineSeries::new(line(), colour.stroke_width(2)))?,
                Some((dash, gap)) => {
                    chart.draw_series(DashedLineSeries::new(line(), dash, gap, colour.stroke_width(2)))?
                }
            };
            // Few enough markers that they can be told apart.
            let every = points.len().div_ceil(12).max(1);
            let marked = points.iter().skip(every / 2).step_by(every).copied();
            let drawn = chart.draw_series(marked.map(|at| EmptyElement::at(at) + marker(index, (0, 0), colour)))?;
            if self.series.len() > 1 {
                drawn.label(&series.name).legend(move |at| {
                    let [left, right] = piece(index, colour);
                    EmptyElement::at(at) + left + right + marker(index, (10, 0), colour)
                });
            }
        }
        if self.series.len() > 1 {
            chart
                .configure_series_labels()
                .position(self.emptiest_place(&x, &y))
                .background_style(WHITE.mix(0.85))
                .border_style(RGBColor(200, 200, 200))
                .label_font(("sans-serif", LETTERS).into_font().color(&INK))
                .draw()?;
        }
        Ok(())
    }

    /// What the panel shows, for those who do not see it: the axes, and where each curve begins and ends.
    fn words(&self) -> String {
        let curve = |series: &Series| {
            let points = series.finite();
            let (first, last) = (points.first()?, points.last()?);
            let near = |number: f64| format!("{:.3}", number);
            Some(format!("; {} from {} to {}", series.name, near(first.1), near(last.1)))
        };
        format!("{} against {}{}", self.y, self.x, self.series.iter().filter_map(curve).collect::<String>())
    }

    /// Where the legend hides the fewest points; in doubt in a corner.
    fn emptiest_place(&self, x: &Range<f64>, y: &Range<f64>) -> SeriesLabelPosition {
        let share = |number: f64, of: &Range<f64>| (number - of.start) / (of.end - of.start);
        let points = self.series.iter().flat_map(Series::finite);
        let points: Vec<(f64, f64)> = points.map(|point| (share(point.0, x), share(point.1, y))).collect();
        // Of the panel's height, and whether it stands at the right of it.
        let height = (0.14 * self.series.len() as f64).min(0.5);
        let (upper, lower, middle) = (1.0 - height..=1.0, 0.0..=height, 0.5 - height / 2.0..=0.5 + height / 2.0);
        let places = [
            (SeriesLabelPosition::UpperRight, true, &upper),
            (SeriesLabelPosition::LowerRight, true, &lower),
            (SeriesLabelPosition::UpperLeft, false, &upper),
            (SeriesLabelPosition::LowerLeft, false, &lower),
            (SeriesLabelPosition::MiddleRight, true, &middle),
            (SeriesLabelPosition::MiddleLeft, false, &middle),
        ];
        let hidden = |(_, is_right, rows): &(SeriesLabelPosition, bool, &RangeInclusive<f64>)| {
            let columns = if *is_right { 1.0 - LEGEND_WIDTH..=1.0 } else { 0.0..=LEGEND_WIDTH };
            points.iter().filter(|point| columns.contains(&point.0) && rows.contains(&point.1)).count()
        };
        places.into_iter().min_by_key(hidden).map_or(SeriesLabelPosition::UpperRight, |(place, ..)| place)
    }

    /// From the least to the greatest number, with a little room around.
    fn range(&self, of: fn(&(f64, f64)) -> f64) -> Range<f64> {
        let numbers = || self.series.iter().flat_map(|series| &series.points).map(of).filter(|x| x.is_finite());
        let (Some(least), Some(greatest)) = (smallest(numbers()), largest(numbers())) else { return 0.0..1.0 };
        let room = if greatest > least { 0.05 * (greatest - least) } else { 0.5 * greatest.abs().max(1.0) };
        least - room..greatest + room
    }
}

impl Series {
    fn finite(&self) -> Vec<(f64, f64)> {
        self.points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect()
    }
}

/// A number on an axis, without what rounding left of zero and without digits that say nothing.
fn tick(number: &f64) -> String {
    let size = number.abs();
    if size < 1e-12 {
        return "0".to_string();
    }
    if !(1e-4..1e6).contains(&size) {
        return format!("{number:.1e}");
    }
    let digits = format!("{number:.6}");
    digits.trim_end_matches('0').trim_end_matches('.').to_string()
}

/// The text, cut where it would be longer than this; letters are no wider than these in the fonts that browsers choose.
fn fitting(text: &str, pixels: u32) -> String {
    let most = (f64::from(pixels) / (0.5 * f64::from(LETTERS))) as usize;
    match text.chars().count() > most {
        true => text.chars().take(most.saturating_sub(1)).chain(['…']).collect(),
        false => text.to_string(),
    }
}

/// A piece of a curve for the legend: the parts left and right of its marker meet below it where the line is solid.
fn piece(index: usize, colour: RGBColor) -> [PathElement<(i32, i32)>; 2] {
    let reach = if DASHES[index % DASHES.len()].is_some() { 6 } else { 10 };
    [(0, reach), (20 - reach, 20)].map(|(from, to)| PathElement::new(vec![(from, 0), (to, 0)], colour.stroke_width(2)))
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
        let figure = Figure { title: "A title".into(), panels: vec![panel, empty] };
        let svg = figure.svg().unwrap();
        assert!(
            ["A title", "update", "reward", "one", "two", "nothing"].iter().all(|text| svg.contains(text)),
            "{svg}"
        );
        assert!(svg.starts_with("<svg") && !svg.contains("NaN"));
        let [(words, alone), (nothing, _)] = &figure.panels().unwrap()[..] else { panic!("two panels") };
        assert_eq!(words, "reward against update; one from 1.000 to 3.000; two from 1.000 to 3.000");
        assert_eq!(nothing, " against nothing");
        assert!(alone.contains("reward") && !alone.contains("A title") && !alone.contains("nothing"), "{alone}");
    }

    #[test]
    fn curves_differ_without_colours_and_the_legend_stands_where_no_point_is() {
        let panel = Panel {
            series: (0..4)
                .map(|index| Series { name: format!("{index}"), points: vec![(0.0, 1.0), (1.0, 2.0)] })
                .collect(),
            ..Default::default()
        };
        assert!(matches!(panel.emptiest_place(&(0.0..1.0), &(1.0..2.0)), SeriesLabelPosition::LowerRight));
        // One number above the other: in no corner is there room for a legend that reaches over the middle.
        let alone = |y| Series { name: "one".to_string(), points: vec![(0.5, y)] };
        let numbers = Panel { series: vec![alone(0.02), alone(0.98)], ..Default::default() };
        assert!(matches!(numbers.emptiest_place(&(0.0..1.0), &(0.0..1.0)), SeriesLabelPosition::MiddleRight));
        let svg = Figure { panels: vec![panel], ..Default::default() }.svg().unwrap();
        // Of each colour, into how many pieces its curve falls: one for the solid line, and of dashes the more the shorter they are.
        let pieces = COLOURS.map(|RGBColor(red, green, blue)| {
            let colour = format!("stroke=\"#{red:02X}{green:02X}{blue:02X}\"");
            svg.lines().filter(|line| line.contains("<polyline") && line.contains(&colour)).count()
        });
        assert!(pieces[0] < pieces[3] && pieces[3] < pieces[1] && pieces[1] < pieces[2], "{pieces:?}");
    }

    #[test]
    fn numbers_on_axes_are_short() {
        let numbers = [-0.0, 8.0, -0.30000000000000004, 120.0, 2e6, 0.00001, 1e-17];
        assert_eq!(numbers.map(|number| tick(&number)), ["0", "8", "-0.3", "120", "2.0e6", "1.0e-5", "0"]);
    }

    #[test]
    fn names_of_axes_are_cut_where_they_do_not_fit() {
        assert_eq!(fitting("√nats", 100), "√nats");
        assert_eq!(fitting(&"x".repeat(99), 85), "xxxxxxxxx…");
    }
}
