//! LoRA's tensors, as PEFT stores them.

use super::config::{is_pissa, read_settings};
use super::{Lora, down_key, initial, magnitude_key, up_key};
use crate::adapt::base::Base;
use crate::adapt::peft::{self, AdapterFiles};
use crate::adapt::targets::{self, TargetLinear};
use crate::adapt::tokens::TokenRows;
use crate::adapt::whole;
use crate::bail;
use crate::error::Result;
use crate::settings::LoraInit;

impl Lora {
    /// Reads an adapter of PEFT's form.
    pub fn read(files: &mut AdapterFiles, base: &Base) -> Result<Self> {
        let architecture = base.architecture();
        let mut lora = Lora::empty(read_settings(&files.config())?, base);
        lora.tied = files.ties_output;
        lora.tokens = TokenRows::of_lora(&files.config(), architecture)?;
        let starts_from_base = is_pissa(&files.config())?;
        if starts_from_base && lora.settings.use_dora {
            bail!(
                "{}: use_dora and init_lora_weights \"pissa\" are not supported together; let PEFT convert the adapter (save_pretrained with path_initial_model_for_weight_conversion), or train it with one of them",
                files.config().file
            );
        }
        for linear in targets::linears(architecture) {
            lora.read_update(files, &linear, starts_from_base, base)?;
        }
        lora.read_embedding(files, base)?;
        lora.read_output(files, starts_from_base, base)?;
        let (embedding, output) = (lora.embedding.clone(), lora.output.module.clone());
        // The update of a tied output matrix is the embeddings'.
        let has_output = architecture.causal && !lora.tied && files.is_of_language_model()?;
        let others = [embedding].into_iter().chain(has_output.then_some(output));
        peft::check_selected(files, &lora.scales.keys().collect(), others, base.architecture())?;
        lora.tokens.take(files, &mut lora.tensors, base)?;
        for (name, tensor) in whole::take(files, base)?.iter() {
            lora.tensors.set(name, tensor.clone());
        }
        if lora.tied {
            lora.drop_copies(files);
        }
        Ok(lora)
    }

    fn read_update(
        &mut self,
        files: &mut AdapterFiles,
        linear: &TargetLinear,
        starts_from_base: bool,
        base: &Base,
    ) -> Result<()> {
        let name = &linear.name;
        let (down, up) = match (files.take(&down_key(name)), files.take(&up_key(name))) {
            (None, None) => return Ok(()),
            (Some(down), Some(up)) => (down, up),
            (found, _) => bail!(
                "{}: tensor \"{}\" is missing, the other half of the update is there; copy or download the adapter again",
                files.path.display(),
                if found.is_some() { up_key(name) } else { down_key(name) }
            ),
        };
        let rank = down.dims().first().copied().unwrap_or(0);
        if rank == 0 || down.dims() != [rank, linear.d_in] || up.dims() != [linear.d_out, rank] {
            bail!(
                "{}: the update of \"{name}\" has shapes {:?} and {:?}, but the base model's linear is [{}, {}]; this adapter belongs to another base model",
                files.path.display(),
                down.dims(),
                up.dims(),
                linear.d_out,
                linear.d_in
            );
        }
        self.check_rank(files, name, rank)?;
        let scale = self.scale(name, rank)?;
        if starts_from_base {
            let weight = match *name == self.output.module {
                true => base.model.transformer().output().clone(),
                false => base.model.weights().matrix(&format!("{name}.weight"))?,
            };
            let (down, up) = initial::update(LoraInit::Pissa, &weight, name, rank, scale, base.seed)?;
            self.start.set(&down_key(name), down);
            self.start.set(&up_key(name), up);
        }
        self.scales.insert(name.clone(), scale);
        self.tensors.set(&down_key(name), down);
        self.tensors.set(&up_key(name), up);
        if self.settings.use_dora {
            let key = magnitude_key(name);
            self.tensors.set(&key, files.take_of_shape(&key, &[linear.d_out])?);
        }
        Ok(())
    }

    /// Refuses an update of another rank than the configuration says, which PEFT cannot load either: its scale would be another.
    fn check_rank(&self, files: &AdapterFiles, name: &str, rank: usize) -> Result<()> {
        let expected = self.rank(name)?;
        if rank != expected {
            bail!(
                "{}: the update of \"{name}\" has rank {rank}, but adapter_config.json says {expected} (r, rank_pattern); correct the configuration",
                files.path.display()
            );
        }
        Ok(())
    }

    fn read_embedding(&mut self, files: &mut AdapterFiles, base: &Base) -> Result<()> {
        let architecture = base.architecture();
        let (d_model, vocabulary) = (architecture.d_model, architecture.vocabulary);
        let name = self.embedding.clone();
        let Some(down) = files.take(&format!("{name}.lora_embedding_A")) else { return Ok(()) };
        let rank = down.dims().first().copied().unwrap_or(0);
        if rank == 0 || down.dims() != [rank, vocabulary] {
            bail!(
                "{}: the update of \"{name}\" has shape {:?}, expected [rank, {vocabulary}], the size of the base model's vocabulary",
                files.path.display(),
                down.dims()
            );
        }
        self.check_rank(files, &name, rank)?;
        if self.settings.use_dora {
            bail!(
                "{}: an update of \"{name}\" with use_dora is not supported; train without use_dora, or without the embeddings",
                files.path.display()
            );
        }
        let up = files.take_of_shape(&format!("{name}.lora_embedding_B"), &[d_model, rank])?;
        self.scales.insert(name.clone(), self.scale(&name, rank)?);
        self.tensors.set(&format!("{name}.lora_embedding_A"), down);
        self.tensors.set(&format!("{name}.lora_embedding_B"), up);
        Ok(())
    }

    /// The update of the output matrix. One that is tied to the embeddings' has no numbers of its own.
    fn read_output(&mut self, files: &mut AdapterFiles, starts_from_base: bool, base: &Base) -> Result<()> {
        let architecture = base.architecture();
        if !architecture.causal || self.tied {
            return Ok(());
        }
        self.read_update(files, &targets::output_linear(architecture), starts_from_base, base)?;
        Ok(())
    }

    /// Drops what PEFT stores a second time of an output matrix that is tied to the embeddings.
    fn drop_copies(&mut self, files: &mut AdapterFiles) {
        self.tensors.remove(&self.output.module_weight);
        files.take(&down_key(&self.output.module));
        files.take(&up_key(&self.output.module));
    }
}
