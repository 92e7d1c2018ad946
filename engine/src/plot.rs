//! Plots as SVG: panels of lines over one horizontal axis, readable on light and on dark.

use std::fmt::Write as _;

/// Values over a range of the horizontal axis.
pub struct Line {
    /// What it is, for the legend.
    pub name: String,
    /// (x, y), in the order of x. Values that are not finite leave a gap.
    pub points: Vec<(f64, f64)>,
}

/// Lines that share a vertical axis.
pub struct Panel {
    /// What is shown, with its unit.
    pub label: String,
    /// The lines; up to three have a colour of their own.
    pub lines: Vec<Line>,
    /// Values that the axis reaches in any case.
    pub reach: Vec<f64>,
}

const WIDTH: f64 = 760.0;
const PANEL: f64 = 210.0; // from one panel's top to the next's
const LEFT: f64 = 72.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 62.0;
const BOTTOM: f64 = 52.0;
/// Height of a panel's frame.
const FRAME: f64 = 160.0;

/// Colours for both backgrounds: ink, paper, grid, then lines that people with red-green blindness tell apart.
const STYLE: &str = "\
text{font:12px system-ui,sans-serif;fill:#24292f}.title{font-size:15px;font-weight:600}
.paper{fill:#fff}.grid{stroke:#d8dee4}.frame{fill:none;stroke:#6e7781}
.line{fill:none;stroke-width:1.8}.l0{stroke:#0969da}.l1{stroke:#bc4c00}.l2{stroke:#8250df}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.paper{fill:#0d1117}.grid{stroke:#30363d}.frame{stroke:#8b949e}
.l0{stroke:#58a6ff}.l1{stroke:#f0883e}.l2{stroke:#bc8cff}}
";

/// The plot. `x` names the horizontal axis, which runs over `range`.
pub fn svg(title: &str, x: &str, range: (f64, f64), panels: &[Panel]) -> String {
    let height = TOP + PANEL * panels.len().max(1) as f64 - (PANEL - FRAME) + BOTTOM;
    let mut out = String::new();
    let right = WIDTH - RIGHT;
    let axis = Axis::new([range.0, range.1], 8, false);
    let across = |v: f64| LEFT + (right - LEFT) * axis.part(v);
    // Writing to a String does not fail.
    let _ = write!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" role=\"img\">\n<title>{title}</title>\n<style>{STYLE}</style>\n<rect class=\"paper\" width=\"{WIDTH}\" height=\"{height}\"/>\n<text class=\"title\" x=\"{LEFT}\" y=\"24\">{title}</text>\n",
        title = escape(title)
    );
    for (i, panel) in panels.iter().enumerate() {
        let top = TOP + PANEL * i as f64;
        draw_panel(&mut out, panel, &axis, top);
    }
    let bottom = height - BOTTOM;
    for tick in axis.ticks() {
        let _ = writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            across(tick),
            bottom + 18.0,
            axis.word(tick)
        );
    }
    let _ = write!(
        out,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\n</svg>\n",
        (LEFT + right) / 2.0,
        bottom + 40.0,
        escape(x)
    );
    out
}

/// A map of parts of a whole, from 0 to 1: a row of cells for each name of `down`, each cell with its per cent.
pub fn map(
    title: &str,
    (x, across): (&str, &[String]),
    (y, down): (&str, &[String]),
    cell: &dyn Fn(usize, usize) -> f64,
) -> String {
    const HIGH: f64 = 34.0;
    let wide = (WIDTH - LEFT - RIGHT) / across.len().max(1) as f64;
    let bottom = TOP + HIGH * down.len() as f64;
    let height = bottom + BOTTOM;
    let mut out = String::new();
    // Writing to a String does not fail.
    let _ = write!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" role=\"img\">\n<title>{title}</title>\n<style>{STYLE}.cell{{fill:#0969da;stroke:#6e7781}}</style>\n<rect class=\"paper\" width=\"{WIDTH}\" height=\"{height}\"/>\n<text class=\"title\" x=\"{LEFT}\" y=\"24\">{title}</text>\n<text x=\"{LEFT}\" y=\"{:.1}\">{}</text>\n",
        TOP - 8.0,
        escape(y),
        title = escape(title)
    );
    for (i, name) in down.iter().enumerate() {
        let top = TOP + HIGH * i as f64;
        let _ = writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 8.0,
            top + HIGH / 2.0 + 4.0,
            escape(name)
        );
        for j in 0..across.len() {
            let part = cell(i, j).clamp(0.0, 1.0);
            let left = LEFT + wide * j as f64;
            let _ = writeln!(
                out,
                "<rect class=\"cell\" fill-opacity=\"{:.2}\" x=\"{left:.1}\" y=\"{top:.1}\" width=\"{wide:.1}\" height=\"{HIGH}\"/>\n<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{:.0} %</text>",
                0.6 * part,
                left + wide / 2.0,
                top + HIGH / 2.0 + 4.0,
                100.0 * part
            );
        }
    }
    for (j, name) in across.iter().enumerate() {
        let _ = writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            LEFT + wide * (j as f64 + 0.5),
            bottom + 18.0,
            escape(name)
        );
    }
    let _ = write!(
        out,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\n</svg>\n",
        (LEFT + WIDTH - RIGHT) / 2.0,
        bottom + 40.0,
        escape(x)
    );
    out
}

fn draw_panel(out: &mut String, panel: &Panel, axis: &Axis, top: f64) {
    let right = WIDTH - RIGHT;
    let across = |v: f64| LEFT + (right - LEFT) * axis.part(v);
    let values = panel.lines.iter().flat_map(|l| &l.points).map(|p| p.1);
    let values = values.chain(panel.reach.iter().copied());
    let up = Axis::new(values.filter(|v| v.is_finite()), 5, true);
    let height = |v: f64| top + FRAME * (1.0 - up.part(v));
    for tick in axis.ticks() {
        let x = across(tick);
        let _ = writeln!(
            out,
            "<line class=\"grid\" x1=\"{x:.1}\" y1=\"{top}\" x2=\"{x:.1}\" y2=\"{:.1}\"/>",
            top + FRAME
        );
    }
    for tick in up.ticks() {
        let y = height(tick);
        let _ = writeln!(
            out,
            "<line class=\"grid\" x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{right}\" y2=\"{y:.1}\"/>\n<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 8.0,
            y + 4.0,
            up.word(tick)
        );
    }
    let _ = writeln!(
        out,
        "<rect class=\"frame\" x=\"{LEFT}\" y=\"{top}\" width=\"{}\" height=\"{FRAME}\"/>\n<text x=\"{LEFT}\" y=\"{:.1}\">{}</text>",
        right - LEFT,
        top - 8.0,
        escape(&panel.label)
    );
    for (i, line) in panel.lines.iter().enumerate() {
        let class = i % 3;
        let whole = |p: &&[(f64, f64)]| p[0].1.is_finite();
        let parts = line
            .points
            .chunk_by(|a, b| a.1.is_finite() == b.1.is_finite());
        for part in parts.filter(whole) {
            let points: Vec<String> = part
                .iter()
                .map(|(x, y)| format!("{:.1},{:.1}", across(*x), height(*y)))
                .collect();
            // A single point is a short dash.
            let points = match &points[..] {
                [one] => format!(
                    "{one} {:.1},{:.1}",
                    across(part[0].0) + 4.0,
                    height(part[0].1)
                ),
                several => several.join(" "),
            };
            let _ = writeln!(
                out,
                "<polyline class=\"line l{class}\" points=\"{points}\"/>"
            );
        }
        if panel.lines.len() > 1 {
            let x = right - 150.0 * (panel.lines.len() - i) as f64;
            let y = top - 12.0;
            let _ = writeln!(
                out,
                "<line class=\"line l{class}\" x1=\"{x:.1}\" y1=\"{y:.1}\" x2=\"{:.1}\" y2=\"{y:.1}\"/>\n<text x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                x + 18.0,
                x + 24.0,
                y + 4.0,
                escape(&line.name)
            );
        }
    }
}

/// A linear axis whose ticks are round numbers.
struct Axis {
    from: f64,
    to: f64,
    step: f64,
}

impl Axis {
    /// Reaches all of `values` with some `count` ticks; `rounded` moves its ends to ticks.
    fn new(values: impl IntoIterator<Item = f64>, count: usize, rounded: bool) -> Axis {
        let (mut from, mut to) = values
            .into_iter()
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| {
                (a.min(v), b.max(v))
            });
        if from > to {
            (from, to) = (0.0, 1.0);
        }
        if to - from <= 1e-12 * to.abs().max(from.abs()) {
            let more = if to == 0.0 { 1.0 } else { to.abs() * 0.5 };
            to += more;
        }
        let raw = (to - from) / count as f64;
        let ten = 10_f64.powf(raw.log10().floor());
        let round = [1.0, 2.0, 5.0, 10.0].into_iter().find(|r| r * ten >= raw);
        let step = round.unwrap_or(10.0) * ten;
        if rounded {
            from = (from / step).floor() * step;
            to = (to / step).ceil() * step;
        }
        Axis { from, to, step }
    }

    /// 0 at the beginning, 1 at the end.
    fn part(&self, value: f64) -> f64 {
        (value - self.from) / (self.to - self.from)
    }

    fn ticks(&self) -> Vec<f64> {
        let slack = 1e-9 * self.step;
        let first = ((self.from - slack) / self.step).ceil() as i64;
        let last = ((self.to + slack) / self.step).floor() as i64;
        (first..=last).map(|i| i as f64 * self.step).collect()
    }

    /// A tick in as many digits as tell it from the next.
    fn word(&self, tick: f64) -> String {
        if self.step < 1e-4 {
            return if tick == 0.0 {
                "0".into()
            } else {
                format!("{tick:.1e}")
            };
        }
        let digits = (-(self.step * 1.000_001).log10().floor()).max(0.0) as usize;
        format!("{tick:.digits$}")
    }
}

fn escape(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            // Not allowed in XML.
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_within() {
        let cases: [([f64; 2], usize, &[&str]); 5] = [
            ([0.0, 1000.0], 5, &["0", "200", "400", "600", "800", "1000"]),
            ([0.3, 1.0], 4, &["0.2", "0.4", "0.6", "0.8", "1.0"]),
            ([0.0, 0.0], 2, &["0.0", "0.5", "1.0"]),
            ([7.0, 7.0], 4, &["7", "8", "9", "10", "11"]),
            ([0.0, 3e-5], 3, &["0", "1.0e-5", "2.0e-5", "3.0e-5"]),
        ];
        for (range, count, expected) in cases {
            let axis = Axis::new(range, count, true);
            let words: Vec<String> = axis.ticks().iter().map(|t| axis.word(*t)).collect();
            assert_eq!(words, expected, "{range:?}");
            for end in range {
                assert!((0.0..=1.0).contains(&axis.part(end)), "{range:?}");
            }
        }
    }

    #[test]
    fn a_plot_is_whole_whatever_its_values() {
        let line = |points: &[(f64, f64)]| Line {
            name: "a <b> & \"c\"\u{1}".into(),
            points: points.to_vec(),
        };
        let panels = [
            Panel {
                label: "x".into(),
                lines: vec![
                    line(&[(0.0, 1.0), (1.0, f64::INFINITY), (2.0, 3.0), (3.0, 4.0)]),
                    line(&[]),
                ],
                reach: vec![0.0],
            },
            Panel {
                label: "none".into(),
                lines: Vec::new(),
                reach: Vec::new(),
            },
        ];
        let text = svg("t < u", "positions", (0.0, 3.0), &panels);
        assert!(text.starts_with("<svg xmlns=") && text.ends_with("</svg>\n"));
        assert!(text.contains("<title>t &lt; u</title>"));
        assert!(text.contains("a &lt;b&gt; &amp; &quot;c&quot; "));
        // The gap cuts the line in two.
        assert_eq!(text.matches("<polyline").count(), 2);
        assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
        for mark in ["svg", "text", "style", "title"] {
            let open = text.matches(&format!("<{mark}")).count();
            let closed = text.matches(&format!("</{mark}>")).count();
            assert_eq!(open, closed, "{mark}");
        }
    }
}
