from fastlm.cli.main import main

main()
