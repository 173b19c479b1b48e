//! The flat lines: checkpoint and rollback time by the number of files, both axes logarithmic.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::cli::Plan;
use crate::results::Results;
use crate::rows::{id, short};
use crate::run::Placement;

/// One line of a plot: its label and its points (files or bytes, milliseconds).
pub type Line = (String, Vec<(f64, f64)>);

/// The axis of a plot that is not time.
#[derive(Debug, Clone, Copy)]
pub struct Axis {
    /// What it says
    pub title: &'static str,
    /// Its values for people
    pub show: fn(u64) -> String,
}

/// Writes a plot for each placement and operation that was measured.
pub fn write(plan: &Plan, results: &Results) -> Result<()> {
    for placement in Placement::ALL {
        for what in ["checkpoint", "rollback"] {
            let lines = lines(plan, results, placement, what);
            if lines.iter().all(|l| l.1.len() < 2) {
                continue;
            }
            let path = plan.out.join(format!("{what}-{}.svg", placement.name()));
            let title = format!("{what} after 100 changed files ({})", placement.name());
            let axis = Axis {
                title: "files",
                show: short,
            };
            draw(&path, &title, axis, &lines)?;
        }
    }
    Ok(())
}

fn lines(plan: &Plan, results: &Results, placement: Placement, what: &str) -> Vec<Line> {
    let points = |row: &str, system: &str| -> Vec<(f64, f64)> {
        let at = |n: &u64| {
            Some((
                *n as f64,
                results.median(placement, &id(row, *n), system)? / 1e3,
            ))
        };
        plan.counts.iter().filter_map(at).collect()
    };
    let call = format!("{what}_call");
    let mut lines = vec![
        ("cowfs, in the daemon".to_owned(), points(what, "cowfs")),
        ("cowfs, whole call".to_owned(), points(&call, "cowfs")),
    ];
    for (system, label) in [
        ("btrfs", "btrfs snapshot"),
        ("overlay", "overlay, mounted anew"),
        ("native", "cp -a"),
    ] {
        lines.push((label.to_owned(), points(&call, system)));
    }
    lines.retain(|l| !l.1.is_empty());
    lines
}

/// Draws lines over logarithmic axes.
pub fn draw(path: &Path, title: &str, axis: Axis, lines: &[Line]) -> Result<()> {
    try_draw(path, title, axis, lines).map_err(|e| anyhow!("drawing {}: {e}", path.display()))
}

fn try_draw(
    path: &Path,
    title: &str,
    axis: Axis,
    lines: &[Line],
) -> Result<(), Box<dyn std::error::Error>> {
    let all = || lines.iter().flat_map(|l| l.1.iter());
    let bounds = |f: fn(&(f64, f64)) -> f64| {
        let low = all().map(f).fold(f64::INFINITY, f64::min);
        let high = all().map(f).fold(f64::MIN_POSITIVE, f64::max);
        (low, high)
    };
    let (x0, x1) = bounds(|p| p.0);
    let (y0, y1) = bounds(|p| p.1);
    let root = SVGBackend::new(path, (760, 460)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(70)
        .build_cartesian_2d(
            (x0 / 1.3..x1 * 1.3).log_scale(),
            (y0 / 2.0..y1 * 2.0).log_scale(),
        )?;
    chart
        .configure_mesh()
        .x_desc(axis.title)
        .y_desc("milliseconds")
        .x_label_formatter(&|x| (axis.show)(x.round() as u64))
        .y_label_formatter(&|y| format!("{y}"))
        .light_line_style(WHITE)
        .draw()?;
    let colours = [RED, MAGENTA, BLUE, GREEN, BLACK, CYAN, RGBColor(160, 90, 0)];
    for (i, (label, points)) in lines.iter().enumerate() {
        let colour = colours[i % colours.len()];
        chart
            .draw_series(LineSeries::new(
                points.iter().copied(),
                colour.stroke_width(2),
            ))?
            .label(label)
            .legend(move |(x, y)| {
                PathElement::new(vec![(x, y), (x + 20, y)], colour.stroke_width(2))
            });
        chart.draw_series(points.iter().map(|p| Circle::new(*p, 4, colour.filled())))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .draw()?;
    root.present()?;
    Ok(())
}
