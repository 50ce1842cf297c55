"What every part uses: errors, text, processes, files, HTML, options and settings"
