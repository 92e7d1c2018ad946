//! `strata classify`.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::json;

use super::output::Terminal;
use super::{Common, Environment, read_text};
use crate::classify::{Classifier, likeliest};
use crate::image::patches;
use crate::load::Model;

/// Say what images show, with a model of images
#[derive(Debug, Args)]
#[command(
    after_help = "Class names come from config.json (`id2label`) or --labels; without either, classes are numbers."
)]
pub struct Classify {
    /// Folder or Hub id (owner/name[@revision])
    model: String,
    /// PNG, JPEG, WebP, BMP or GIF files
    #[arg(required = true)]
    images: Vec<PathBuf>,
    /// How many classes to print for each image
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    top: u16,
    /// Names of the classes, one a line
    #[arg(long, value_name = "FILE")]
    labels: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

impl Classify {
    pub fn run(self, environment: &Environment, terminal: &Terminal) -> Result<()> {
        let model = self.common.load(Some(&self.model), environment, terminal)?;
        let Some(mut classifier) = Classifier::new(model.network.clone())? else {
            bail!(
                "{} reads text, not images; use `strata generate`",
                model.name
            );
        };
        let labels = self.labels(&model)?;
        let bar = terminal.bar("looking", self.images.len(), "images");
        let mut failed = 0;
        for path in &self.images {
            let name = path.display().to_string();
            let read = std::fs::read(path).map_err(|e| anyhow::anyhow!("{name}: {e}"));
            let patches = read.and_then(|bytes| Ok(patches(&bytes, &name, classifier.image())?));
            match patches {
                Ok(patches) => {
                    let logits = classifier.logits(&patches)?;
                    bar.suspend(|| self.print(&name, &logits, &labels))
                        .context("standard output")?;
                }
                // One bad file among many does not lose the others.
                Err(error) => {
                    terminal.note(&format!("error: {error}"));
                    failed += 1;
                }
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        let verbose = self.common.source.verbose;
        terminal.memory(&model, classifier.config(), classifier.allocated(), verbose);
        if failed > 0 {
            bail!("{failed} of {} images could not be read", self.images.len());
        }
        Ok(())
    }

    fn labels(&self, model: &Model) -> Result<Vec<String>> {
        let Some(path) = &self.labels else {
            return Ok(model.labels.clone());
        };
        let labels: Vec<String> = read_text(path)?.lines().map(str::to_string).collect();
        if labels.len() != model.plan.vocab {
            bail!(
                "{}: {} lines, but {} has {} classes",
                path.display(),
                labels.len(),
                model.name,
                model.plan.vocab
            );
        }
        Ok(labels)
    }

    fn print(&self, image: &str, logits: &[f32], labels: &[String]) -> io::Result<()> {
        let mut out = io::stdout().lock();
        let classes = likeliest(logits, usize::from(self.top));
        if self.common.source.json {
            let class = |(class, probability): &(usize, f64)| json!({"class": class, "label": labels.get(*class), "probability": probability});
            let classes: Vec<_> = classes.iter().map(class).collect();
            return writeln!(out, "{}", json!({"image": image, "classes": classes}));
        }
        writeln!(out, "{image}")?;
        for (class, probability) in classes {
            let label = labels.get(class).map_or("", String::as_str);
            let line = format!("  {:6.2} %  {class:>5}  {label}", 100.0 * probability);
            writeln!(out, "{}", line.trim_end())?;
        }
        Ok(())
    }
}
