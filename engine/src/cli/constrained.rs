//! Options that hold output to a form.

use std::path::Path;

use anyhow::{Context, Result};
use clap::Args;

use super::output::Terminal;
use super::read_text;
use crate::constraint::{Constraint, Source};
use crate::load::Model;

/// The form that the text must have. The model's own likelihoods choose among what it allows.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Form")]
#[group(id = "form", multiple = false)]
pub struct Form {
    /// Write JSON that is valid under this schema: a file, or the schema itself
    #[arg(long, value_name = "FILE|TEXT")]
    json_schema: Option<String>,
    /// Write what the rule `start` of this Lark grammar derives
    #[arg(long, value_name = "FILE")]
    grammar: Option<String>,
    /// Write what this regular expression matches
    #[arg(long, value_name = "TEXT")]
    regex: Option<String>,
    /// Write this text, or another that is given so
    #[arg(long, value_name = "TEXT")]
    choice: Vec<String>,
}

impl Form {
    /// What is asked for, read before a model is loaded.
    pub fn source(&self) -> Result<Option<Source>> {
        if let Some(schema) = &self.json_schema {
            let inline = schema.trim_start().starts_with('{');
            let text = match inline {
                true => schema.clone(),
                false => read_text(Path::new(schema))?,
            };
            let named = if inline { "the schema" } else { schema };
            let value = serde_json::from_str(&text)
                .with_context(|| format!("--json-schema: {named} is no JSON"))?;
            return Ok(Some(Source::JsonSchema(value)));
        }
        if let Some(path) = &self.grammar {
            return Ok(Some(Source::Grammar(read_text(Path::new(path))?)));
        }
        let choice = || (!self.choice.is_empty()).then(|| Source::Choice(self.choice.clone()));
        Ok(self.regex.clone().map(Source::Regex).or_else(choice))
    }

    /// The same for `model`; says what of it is taken less strictly than it is meant.
    pub fn constraint(
        source: Option<&Source>,
        model: &Model,
        terminal: &Terminal,
    ) -> Result<Option<Constraint>> {
        let Some(source) = source else {
            return Ok(None);
        };
        let constraint = model.constrain(source)?;
        for warning in constraint.warnings() {
            terminal.note(&format!("{}: {warning}", source.kind()));
        }
        Ok(Some(constraint))
    }
}
